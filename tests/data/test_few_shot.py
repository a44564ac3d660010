from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from PIL import Image

from command import QUICK, Command
from nets import MIXED, fit, images_in
from vitrim.data import ImageSpec
from vitrim.data.few_shot import FewShotSubset, few_shot, shares
from vitrim.data.image_files import ImageFiles
from vitrim.errors import ConfigError

SPEC = ImageSpec(
    channels=3,
    size=(16, 16),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=1.0,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 3, 4, 5 and 6 training images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, extra in (("train", 0), ("val", -2)):
        for index, name in enumerate("abcd"):
            (root / split / name).mkdir(parents=True)
            for number in range(3 + index + extra):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def opened(root: Path, samples: int | None, seed: int = 0, **changes: Any) -> ImageFiles:
    settings = {"samples": samples, "samples_seed": seed, "batch_size": 8, "mixing": MIXED}
    return images_in(root, **settings, **changes)


def classes_of(images: ImageFiles) -> Counter[str]:
    return Counter(Path(name).parent.name for name in images.sample_names)


@pytest.mark.parametrize("samples", [2, 3])
def test_fewer_images_than_classes_are_of_distinct_classes(root: Path, samples: int) -> None:
    drawn = [classes_of(opened(root, samples, seed)) for seed in range(20)]
    assert all(sorted(counts.values()) == [1] * samples for counts in drawn)
    assert set().union(*drawn) == set("abcd")


def test_more_images_come_from_all_classes_alike(root: Path) -> None:
    assert classes_of(opened(root, 8)) == dict.fromkeys("abcd", 2)
    drawn = [classes_of(opened(root, 10, seed)) for seed in range(20)]
    assert all(sorted(counts.values()) == [2, 2, 3, 3] for counts in drawn)
    assert len({tuple(sorted(counts.items())) for counts in drawn}) == 6


@pytest.mark.parametrize("samples", [1, 4, 7, 1000, 1999])
def test_shares_add_up_and_differ_by_one(samples: int) -> None:
    counts = shares(samples, 4, random.Random(0))
    assert sum(counts) == samples
    assert max(counts) - min(counts) <= 1


def test_the_seed_decides_and_the_order_of_the_files_does_not(root: Path) -> None:
    assert opened(root, 6).sample_names == opened(root, 6).sample_names
    assert len({tuple(opened(root, 6, seed).sample_names) for seed in range(5)}) == 5
    dataset = opened(root, None).train.dataset
    names = [Path(path).relative_to(root).as_posix() for path in dataset.paths]
    rows = random.Random(1).sample(range(len(names)), len(names))
    dataset.paths = [dataset.paths[row] for row in rows]
    mixed = few_shot(
        dataset,
        classes=dict(enumerate("abcd")),
        labels=[dataset.targets[row] for row in rows],
        names=[names[row] for row in rows],
        samples=6,
        seed=0,
    )
    assert mixed.names == opened(root, 6).sample_names
    assert [Path(dataset.paths[index]).name for index in mixed.indices] == [
        Path(name).name for name in mixed.names
    ]


def test_null_takes_everything(root: Path) -> None:
    images = opened(root, None)
    assert images.sample_names == ()
    assert len(images.train) == 18


@pytest.mark.parametrize(
    ("samples", "seed", "expected"),
    [
        (0, 0, ["data.samples=0", "from 2 on"]),
        (1, 0, ["data.samples=1", "null"]),
        (-2, 0, ["data.samples=-2"]),
        (2.5, 0, ["data.samples=2.5"]),
        (True, 0, ["data.samples=True"]),
        (2, -1, ["data.samples_seed=-1", "from 0 on"]),
        (19, 0, ["data.samples=19", "only 18", "data.samples=null"]),
        (16, 0, ["data.samples=16", "4 of class a", "3 training images", "fewer"]),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    root: Path, samples: Any, seed: int, expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(root, samples, seed)
    for words in expected:
        assert words in str(caught.value)


def test_of_imagenets_classes_those_with_a_folder_count(tmp_path: Path) -> None:
    for split, names in (("train", ("n01440764", "n15075141")), ("val", ("n01440764",))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (16, 16)).save(tmp_path / split / name / f"{number}.png")
    images = opened(tmp_path, 5)
    assert images.n_classes == 1000
    assert sorted(classes_of(images).values()) == [2, 3]
    (tmp_path / "val" / "n01484850").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "val" / "n01484850" / "0.png")
    with pytest.raises(ConfigError, match="class n01484850 are needed, and it has 0 training"):
        opened(tmp_path, 5)


def test_few_images_of_no_training_folder_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.samples=4: no folder .*nothing"):
        opened(root, 4, train="nothing")


def test_every_image_is_decoded_once_for_training_and_calibration(root: Path) -> None:
    images = opened(root, 4)
    assert isinstance(images.train, FewShotSubset)
    loaded: list[str] = []
    folder = images.train.dataset.dataset
    load = folder.loader
    folder.loader = lambda path: loaded.append(path) or load(path)
    module = images.module(SPEC)
    for _ in range(3):
        assert len(list(module.train_dataloader())) == 1
        assert len(list(module.calibration_dataloader(100, seed=0))) == 1
    assert sorted(loaded) == sorted(str(root / name) for name in images.sample_names)


def test_calibration_draws_from_the_few(root: Path) -> None:
    images = opened(root, 6)
    module = images.module(SPEC)
    (batch,) = module.calibration_dataloader(1000, seed=0)
    expected = [
        torch.from_numpy(np.array(Image.open(root / name))).permute(2, 0, 1) / 127.5 - 1
        for name in images.sample_names
    ]
    torch.testing.assert_close(batch[0], torch.stack(expected))
    (fewer,) = module.calibration_dataloader(3, seed=0)
    assert all(any(torch.equal(image, other) for other in batch[0]) for image in fewer[0])


class Count(LightningModule):
    """Count the images of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.sizes: list[int] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.sizes.append(len(batch[0]))
        return self.weight * batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("samples", "sizes"), [(2, [2]), (3, [2]), (7, [6]), (8, [8]), (12, [8]), (None, [8, 8])]
)
def test_batches_larger_than_the_set_shrink(
    root: Path, samples: int | None, sizes: list[int]
) -> None:
    phase = Count()
    fit(phase, opened(root, samples).module(SPEC))
    assert phase.sizes == sizes


def run(command: Command, root: Path, *arguments: str) -> Path:
    done = command(
        *("model=vit_digits", "model.args.in_chans=3", "model.num_classes=4"),
        *("method=oneshot", "strength=0", "data=imagefolder", f"data.root={root}"),
        *("data.workers=0", *QUICK, *arguments),
    )
    assert done.code == 0, done.message
    return done.report.parent


def test_the_list_is_saved_with_the_run(command: Command, root: Path) -> None:
    first = run(command, root, "data.samples=6", "seed=0")
    other = run(command, root, "data.samples=6", "seed=1")
    for folder, seed in ((first, 0), (other, 1)):
        names = (folder / "samples.txt").read_text().splitlines()
        assert names == opened(root, 6, seed).sample_names
        assert all((root / name).is_file() for name in names)
    assert first.parent == other.parent  # one series, two seeds
    assert not (run(command, root) / "samples.txt").exists()


def test_one_image_is_refused_before_anything_is_made(command: Command, root: Path) -> None:
    done = command("model=vit_tiny", "data=imagefolder", f"data.root={root}", "data.samples=1")
    assert done.code == 1
    assert "data.samples=1" in done.message
    assert not list(command.out.rglob("recipe.yaml"))


def test_plain_images_are_made_once_in_this_process(root: Path) -> None:
    loaders = opened(root, 4, workers=2).module(SPEC)
    first, again = (loaders.calibration_dataloader(4, 0) for _ in range(2))
    assert first.num_workers == again.num_workers == 0
    assert len([*first]) == 1
    one, two = next(iter(first)), next(iter(again))
    assert one[0].data_ptr() == two[0].data_ptr()
    every = opened(root, None, workers=2).module(SPEC).calibration_dataloader(4, 0)
    assert every.num_workers == 1  # a batch of 8
    assert torch.equal(next(iter(first))[0], next(iter(loaders.augmented_dataloader(4, 0)))[0])
