"""Few images that stay in memory: the same batches as without, made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from PIL import Image
from torch import nn

from nets import images_in, plan_of, small_net
from phase_runner import At, runner, stop
from vitrim import cut
from vitrim.data import ImageSpec, Loaders, kept
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.kept import KeptImages, KeptSets
from vitrim.data.loader import ResumableLoader
from vitrim.jobs import signals
from vitrim.method.dcvit.compression import Compression
from vitrim.method.dcvit.trial_training import TrialRecipe
from vitrim.method.dcvit.trials import Trials
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import FeatureLoss
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.recovery import Recovery, RecoverySettings
from vitrim.trainer.views import Views

SPEC = ImageSpec(
    channels=3,
    size=(16, 16),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=1.0,
)
BYTES = 4 * 3 * 16 * 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of seven training images and two validation images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, number in (("train", 7), ("val", 2)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (18, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


class Counted:
    """Loaders of images, and how many were decoded."""

    def __init__(self, root: Path, **changes: Any) -> None:
        images = images_in(root, **changes)
        self.decoded: list[str] = []
        train: Any = images.train
        folder = (train.dataset if isinstance(train, FewShotSubset) else train).dataset
        load = folder.loader
        folder.loader = lambda path: self.decoded.append(path) or load(path)
        self.loaders: Loaders = images.module(SPEC)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)


def epochs(loader: Any, number: int) -> list[list[torch.Tensor]]:
    found = []
    for epoch in range(number):
        loader.batches.set_epoch(epoch)
        found.append([part.clone() for batch in loader for part in batch])
    return found


def same(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        all(map(torch.equal, mine, theirs)) and len(mine) == len(theirs) for mine, theirs in pairs
    )


def loaders_of(kind: str, loaders: Loaders) -> list[Any]:
    loaders.seed = 5
    if kind == "split":
        return [*loaders.split_dataloaders(10, 3, held_out=0.3, place=(0, 1))]
    if kind == "one of two processes":
        return [*loaders.split_dataloaders(10, 3, held_out=0.3, place=(1, 2))]
    if kind == "augmented":
        return [loaders.augmented_dataloader(6, 3)]
    return [loaders.calibration_dataloader(6, 3)]


@pytest.mark.parametrize("samples", [None, 10])
@pytest.mark.parametrize("kind", ["plain", "split", "one of two processes", "augmented"])
def test_batches_are_those_of_images_that_are_made_again(
    root: Path, kind: str, samples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"samples": samples, "augmentation": {"color_jitter": 0.4}}
    mine = Counted(root, **changes)
    found = [epochs(loader, 3) for loader in loaders_of(kind, mine.loaders)]
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)
    theirs = Counted(root, **changes)
    expected = [epochs(loader, 3) for loader in loaders_of(kind, theirs.loaders)]
    assert all(map(same, found, expected))
    if samples is None and kind != "augmented":
        assert len(mine.decoded) == len({*mine.decoded})
        assert len(theirs.decoded) > 1.5 * len(mine.decoded)


def test_phases_share_what_is_kept(root: Path) -> None:
    mine = Counted(root)
    first, again = (mine.loaders.calibration_dataloader(6, 3) for _ in range(2))
    epochs(first, 1)
    assert len(mine.decoded) == 6
    assert same(epochs(first, 1), epochs(again, 1))
    assert len(mine.decoded) == 6
    one, two = next(iter(first)), next(iter(again))
    assert one[0].data_ptr() == two[0].data_ptr()


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_loader_resumes_within_an_epoch(root: Path, start: int) -> None:
    whole = epochs(Counted(root).loaders.calibration_dataloader(10, 3), 1)[0]
    mine = Counted(root)
    loader: Any = mine.loaders.calibration_dataloader(10, 3)
    loader.load_state_dict({"epoch": 0, "given": start})
    rest = [part for batch in loader for part in batch]
    assert all(map(torch.equal, rest, whole[2 * start :]))
    assert loader.state_dict() == {"epoch": 0, "given": 3}
    loader.load_state_dict(loader.state_dict())
    assert same(epochs(loader, 1), [whole])
    assert len(mine.decoded) == 10


def test_a_part_of_an_epoch_is_kept(root: Path) -> None:
    mine = Counted(root)
    loader = mine.loaders.calibration_dataloader(10, 3)
    for _ in range(3):
        for number, _batch in enumerate(loader):
            if number == 1:
                break
    assert len(mine.decoded) == 8
    assert same(epochs(loader, 1), epochs(Counted(root).loaders.calibration_dataloader(10, 3), 1))
    assert len(mine.decoded) == 10


def test_workers_make_them_once_and_end(root: Path) -> None:
    loader: Any = Counted(root, workers=2).loaders.calibration_dataloader(10, 3)
    expected = epochs(Counted(root).loaders.calibration_dataloader(10, 3), 2)
    assert same(epochs(loader, 2), expected)
    assert loader.num_workers == 2
    assert loader._iterator is None


def test_batches_that_are_changed_in_place_do_no_harm(root: Path) -> None:
    mine = Counted(root)
    loader = mine.loaders.calibration_dataloader(10, 3)
    expected = epochs(loader, 1)
    for images, _ in loader:
        images.zero_()
    assert same(epochs(loader, 2), [expected[0]] * 2)
    for images, _ in loader:
        images.zero_()
    assert same(epochs(loader, 1), expected)
    assert len(mine.decoded) == 20


def test_they_are_kept_in_inference_mode_as_well(root: Path) -> None:
    loader: Any = Counted(root).loaders.calibration_dataloader(10, 3)
    with torch.inference_mode():
        expected = epochs(loader, 1)
        again = epochs(loader, 1)
    assert same(again, expected)
    assert same(epochs(loader, 1), expected)
    assert not next(iter(loader))[0].is_inference()


def test_they_lie_on_the_device_while_a_phase_runs(root: Path) -> None:
    mine = Counted(root)
    loader: Any = mine.loaders.calibration_dataloader(10, 3)
    expected = epochs(loader, 1)
    loader.place_on(torch.device("meta"))  # it has no memory, and copies go there as to any other
    placed = [batch for batch in loader]
    assert {part.device.type for batch in placed for part in batch} == {"meta"}
    loader.place_on(torch.device("cpu"))
    assert same(epochs(loader, 1), expected)
    assert len(mine.decoded) == 10


def test_more_than_the_bound_is_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_BYTES", 9 * BYTES)
    mine = Counted(root)
    loader: Any = mine.loaders.calibration_dataloader(10, 3)
    assert loader.kept is None
    epochs(loader, 2)
    assert len(mine.decoded) == 20
    sets = KeptSets(BYTES)
    first, second = sets.of(range(5)), sets.of(range(3))
    assert sets.of(range(5)) is first
    assert sets.of(range(4)) is not None
    assert sets.of(range(5)) is first  # the one of three images was forgotten
    assert sets.of(range(3)) is not second
    part = KeptImages(2)
    part.add([torch.zeros(1, 3, 2, 2), torch.zeros(1)], 1)
    assert part.n_filled == 0  # the one before is missing


def test_few_images_are_decoded_before_there_are_workers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Counted(root, samples=6, workers=2)
    first = [*mine.loaders.train_dataloader()]
    assert len(mine.decoded) == 6
    again = [*mine.loaders.train_dataloader()]
    assert len(mine.decoded) == 6
    theirs = [*Counted(root, samples=6).loaders.train_dataloader()]
    for batches in (first, again):
        assert all(torch.equal(one[0], two[0]) for one, two in zip(batches, theirs, strict=True))
    monkeypatch.setattr("vitrim.data.few_shot.DECODED_BYTES", 2 * 18 * 20 * 3)
    few = Counted(root, samples=6)
    for _ in range(2):
        assert len([*few.loaders.train_dataloader()]) == 1
    assert len(few.decoded) == 4 + 2  # two of the batch of four were kept


RECIPE = Recipe(epochs=2, lr=1e-3, weight_decay=0.05, warmup_epochs=0, clip_norm=1.0)


def trials(net: nn.Module) -> Trials:
    return Trials(
        net,
        groups=[("blocks.0",), ("blocks.1",)],
        sampling=Sampling(images=10, tokens=4, class_token_weight=1.0),
        compression=Compression(
            width=0.5,
            unit_selection="obs_greedy",
            order_ridge=1e-3,
            reconstruct=True,
            fold_ridge=1e-6,
            init_std=0.02,
            seed=0,
        ),
        recipe=TrialRecipe(training=RECIPE, views="plain", loss=FeatureLoss(), freeze_tail=True),
        synthetic=None,
        distance="kl",
    )


def recovery(net: nn.Module) -> Recovery:
    settings = RecoverySettings(
        trained="all",
        rank=None,
        views=Views(crop=0.5, flip=True, mix=["mixup"]),
        token_weight=1.0,
        pooled_weight=1.0,
        logits_weight=1.0,
        temperature=2.0,
        ema=0.5,
        held_out=0.2,
        patience=None,
        training=RECIPE,
    )
    student = cut(net, plan_of({"blocks.0.mlp.hidden": range(20)}))
    return Recovery(student, net, settings=settings, images=10)


def trained(make: Any, root: Path, folder: Path, *callbacks: Callback) -> dict[str, torch.Tensor]:
    net = small_net(
        dtype=torch.float32, depth=2, img_size=16, patch_size=8, num_classes=2, proj_drop_rate=0.2
    )
    phase = make(net)
    run = replace(runner(folder, minutes=0.0), data=Counted(root).loaders)
    with signals.handled():
        run.run_or_load(folder / "x", phase, name="x", callbacks=callbacks)
    state: dict[str, torch.Tensor] = phase.state_dict()
    return state


@pytest.mark.parametrize("make", [trials, recovery])
def test_phases_end_with_the_same_bits(
    make: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = trained(make, root, tmp_path / "mine")
    with pytest.raises(signals.Preempted):
        trained(make, root, tmp_path / "stopped", At(3, stop()))
    resumed = trained(make, root, tmp_path / "stopped")
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)
    theirs = trained(make, root, tmp_path / "theirs")
    for state in (mine, resumed):
        assert state.keys() == theirs.keys()
        assert all(torch.equal(state[name], theirs[name]) for name in theirs)


def test_loaders_without_kept_images_are_as_they_were(root: Path) -> None:
    loader = Counted(root).loaders.val_dataloader()
    assert isinstance(loader, ResumableLoader)
    loader.place_on(torch.device("meta"))
    assert next(iter(loader))[0].device.type == "cpu"  # type: ignore[index]
