from __future__ import annotations

import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from PIL import Image

from command import Command
from nets import MIXED, fit, images_in
from vitrim.data import ImageSpec
from vitrim.data.imagefolder import label_index
from vitrim.errors import ConfigError

REAL = Path(__file__).parents[3] / "shared" / "data"
SPEC = ImageSpec(
    channels=3,
    size=(32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=0.9,
)


def make(root: Path, **splits: dict[str, int]) -> Path:
    """Write `n` small images per class and split."""
    generator = np.random.default_rng(0)
    for split, classes in splits.items():
        for name, n in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(n):
                pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def test_wnid_folders_get_imagenets_index_whatever_folders_are_missing(tmp_path: Path) -> None:
    last, first, third = "n15075141", "n01440764", "n01484850"
    root = make(tmp_path, train={first: 1, last: 1}, val={third: 2, last: 1})
    images = images_in(root)
    assert images.n_classes == 1000
    assert sorted(set(images.val.labels)) == [2, 999]
    assert sorted(set(images.train.labels)) == [0, 999]


def test_calibration_images_are_training_images_prepared_like_validation(tmp_path: Path) -> None:
    root = make(tmp_path, train={"a": 5, "b": 4})
    shutil.copytree(root / "train", root / "val")
    module = images_in(root, mixing=MIXED).module(SPEC)
    drawn = torch.cat([images for images, _ in module.calibration_dataloader(9, seed=0)])
    assert torch.equal(drawn, torch.stack([image for image, _ in module.val_set]))
    few, same, others = (
        torch.cat([images for images, _ in module.calibration_dataloader(5, seed=seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(few, same)
    assert not torch.equal(few, others)
    assert len(torch.cat([x for x, _ in module.calibration_dataloader(1000, seed=0)])) == 9


def test_augmented_images_are_plain_first_then_augmented_in_another_order(tmp_path: Path) -> None:
    root = make(tmp_path, train={"a": 5, "b": 4}, val={"a": 1, "b": 1})
    module = images_in(root, augmentation={"auto_augment": "rand-m9-mstd0.5-inc1"}).module(SPEC)
    loaders = [module.augmented_dataloader(7, seed=seed) for seed in (1, 1, 2)]
    plain = torch.cat([images for images, _ in module.calibration_dataloader(7, seed=1)])
    assert torch.equal(torch.cat([images for images, _ in loaders[0]]), plain)
    for loader in loaders:
        loader.batches.set_epoch(1)
    one, same, other = (torch.cat([images for images, _ in loader]) for loader in loaders)
    assert torch.equal(one, same)
    assert one.shape == plain.shape
    assert not torch.equal(one, other)
    loaders[0].batches.set_epoch(2)
    assert not torch.equal(torch.cat([images for images, _ in loaders[0]]), one)
    for images in (one, other):
        assert not any(torch.equal(image, known) for image in images for known in plain)


def test_other_names_are_ranked_over_both_splits(tmp_path: Path) -> None:
    images = images_in(make(tmp_path, train={"a": 1, "c": 1}, val={"b": 1, "c": 1}))
    assert images.n_classes == 3
    assert [*images.val.labels] == [1, 2]


def test_a_list_of_classes_takes_these_and_ranks_them(tmp_path: Path) -> None:
    images = images_in(make(tmp_path, val={"a": 1, "b": 2, "c": 1}), classes=["c", "a"])
    assert images.n_classes == 2
    assert [*images.val.labels] == [0, 1]
    assert not images.trainable


def test_a_number_of_classes_is_drawn_with_its_seed() -> None:
    names = [f"{index:03}" for index in range(50)]
    drawn = [label_index(names, 10, seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(drawn[0].values()) == list(range(10))
    assert list(drawn[0]) == sorted(drawn[0])


@pytest.mark.parametrize("classes", [0, 4, ["a", "nonsense"], []])
def test_classes_that_do_not_exist_are_refused(tmp_path: Path, classes: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.classes"):
        images_in(make(tmp_path, val={"a": 1, "b": 1, "c": 1}), classes=classes)


class Collect(LightningModule):
    """Keep what training and validation steps see."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[torch.Tensor]] = {"train": [], "val": []}

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.seen["train"].append(batch[1])
        return self.weight * batch[0].mean()

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.seen["val"].append(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[dict[str, list[torch.Tensor]]]:
    images = images_in(make(tmp_path, train={"a": 4, "b": 5}, val={"a": 2, "b": 3}), mixing=MIXED)
    phase = Collect()
    fit(phase, images.module(SPEC))
    return phase.seen


def test_training_labels_are_mixed_and_soft(seen: dict[str, list[torch.Tensor]]) -> None:
    labels = torch.cat(seen["train"])
    assert labels.shape == (8, 2)  # the ninth image would leave a batch without pairs
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    assert labels.min() > 0


def test_every_validation_image_is_seen_once_and_plain(
    seen: dict[str, list[torch.Tensor]],
) -> None:
    assert torch.cat(seen["val"]).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n20-inc1", "augmix-m10", "v0", "original"]
)
def test_no_augmentation_ends_a_run(tmp_path: Path, policy: str) -> None:
    root = make(tmp_path, train={"a": 1}, val={"a": 1})
    module = images_in(root, augmentation={"auto_augment": policy}).module(SPEC)
    transform = module.train_set.transform
    image = Image.open(tmp_path / "train" / "a" / "0.png")
    for seed in range(300):
        random.seed(seed)
        np.random.seed(seed)
        assert transform(image).shape == (3, 32, 32)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs the measuring data next to the checkout")
def test_the_real_vit_tiny_reaches_its_accuracy(command: Command, tmp_path: Path) -> None:
    with tarfile.open(REAL / "imagenet_mini.tar") as archive:
        names = [name for name in archive.getmembers() if name.name.lstrip("./").startswith("val/")]
        archive.extractall(tmp_path, names, filter="data")
    done = command(
        "model=vit_tiny",
        f"model.checkpoint={REAL / 'vit_tiny_patch16_224.safetensors'}",
        "data=imagefolder",
        f"data.root={tmp_path}",
        "data.workers=0",
        "strength=0",
        "latency.repeats=1",
        "tracking=none",
        "progress=false",
    )
    assert '"top1": 82.0' in done.report.read_text()
