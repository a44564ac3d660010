"""Data sets of other tasks: their configurations, and tiny stand-ins in their layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from command import Command
from vitrim.cli.compose import CONF
from vitrim.data import ImageSpec
from vitrim.data.image_files import ImageFiles

SPEC = ImageSpec(
    channels=3,
    size=(16, 16),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=1.0,
)


def opened(name: str, *overrides: str) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"data={name}", "data.workers=0", *overrides])
        return instantiate(cfg.data, _convert_="all")


def paint(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), shade, np.uint8)).save(path)


def flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write 6 flowers: images 1 and 4 for training, 2 and 5 for validation, 3 and 6 as test."""
    folder = root / "flowers-102"
    for number in range(1, 7):
        paint(folder / "jpg" / f"image_{number:05}.jpg", 40 * number)
    savemat(folder / "imagelabels.mat", {"labels": [1, 1, 1, 2, 2, 2]})
    savemat(folder / "setid.mat", {"trnid": [1, 4], "valid": [2, 5], "tstid": [3, 6]})
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)  # the md5 of the real


def pets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write 6 pets of two breeds: four for training, two as test."""
    folder = root / "oxford-iiit-pet"
    lines = [f"{breed}_{n} {label} 1 1" for label, breed in ((1, "Ab"), (2, "Be")) for n in (1, 2)]
    tests = ["Ab_3 1 1 1", "Be_3 2 1 1"]
    for index, line in enumerate([*lines, *tests]):
        paint(folder / "images" / f"{line.split()[0]}.jpg", 40 * index)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text("\n".join(lines) + "\n")
    (folder / "annotations" / "test.txt").write_text("\n".join(tests) + "\n")


@pytest.mark.parametrize(
    ("name", "made", "n_classes"), [("flowers102", flowers, 102), ("pets", pets, 2)]
)
def test_training_takes_all_that_is_not_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, made: Any, n_classes: int
) -> None:
    made(tmp_path, monkeypatch)
    images = opened(name, f"data.root={tmp_path}")
    assert isinstance(images, ImageFiles)
    assert images.n_classes == n_classes
    module = images.module(SPEC)
    (seen,) = module.calibration_dataloader(100, seed=0)
    assert seen[0].shape == (4, 3, 16, 16)
    assert seen[1].tolist() == ([0, 1, 0, 1] if name == "flowers102" else [0, 0, 1, 1])
    assert len(seen[0].flatten(1).mean(1).unique()) == 4
    (batch,) = module.train_dataloader()
    batch = module.on_after_batch_transfer(batch, 0)
    assert batch[0].shape == (4, 3, 16, 16)
    assert torch.cat([labels for _, labels in module.val_dataloader()]).tolist() == [0, 1]


def test_few_are_drawn_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pets(tmp_path, monkeypatch)
    images = opened("pets", f"data.root={tmp_path}", "data.samples=2")
    (seen,) = images.module(SPEC).calibration_dataloader(100, seed=0)
    assert sorted(seen[1].tolist()) == [0, 1]
    assert len(images.sample_names) == 2
    with pytest.raises(InstantiationException, match="only 4 training images"):
        opened("pets", f"data.root={tmp_path}", "data.samples=5")


@pytest.mark.parametrize("name", ["flowers102", "pets"])
def test_nothing_is_fetched_unless_asked_for(command: Command, tmp_path: Path, name: str) -> None:
    done = command("model=vit_tiny", f"data={name}", f"data.root={tmp_path}")
    assert done.code == 1
    for words in (f"data.root={tmp_path}", name, "data.download=true"):
        assert words in done.message
    assert not list(tmp_path.rglob("*.*gz"))


def test_other_names_are_refused() -> None:
    with pytest.raises(
        InstantiationException, match=r"data\.name=trees: expected flowers102 or pets"
    ):
        opened("pets", "data.name=trees")


@pytest.mark.parametrize("name", ["cub200", "indoor67"])
def test_folders_of_others_are_image_folders(tmp_path: Path, name: str) -> None:
    for split in ("train", "val"):
        for kind in ("001.Albatross", "002.Auklet"):
            paint(tmp_path / split / kind / "1.jpg", 90)
    images = opened(name, f"data.root={tmp_path}")
    assert (images.n_classes, len(images.train), len(images.val)) == (2, 2, 2)


SHARED: dict[str, Any] = {
    "samples": None,
    "samples_seed": 3,
    "batch_size": 256,
    "mixing": {
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "prob": 1.0,
        "switch_prob": 0.5,
        "label_smoothing": 0.1,
    },
}
AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3}
FILES = ("cub200", "flowers102", "imagefolder", "indoor67", "pets")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", *FILES])
def test_sets_of_images_share_their_settings(name: str) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"data={name}", "data.root=X", "seed=3"])
    data: Any = OmegaConf.to_container(
        OmegaConf.create({"seed": 3, "data": cfg.data}), resolve=True
    )
    data = data["data"]
    assert {key: data[key] for key in SHARED} == SHARED
    erasing = {
        "imagefolder": {"re_prob": 0.25, "re_mode": "pixel"},
        "cub200": {"re_prob": 0.0, "re_mode": "pixel"},
        "indoor67": {"re_prob": 0.0, "re_mode": "pixel"},
    }
    backend = {"backend": "tensor" if name in FILES else "pil"}
    assert data["augmentation"] == AUGMENTED | backend | erasing.get(name, {"re_prob": 0.0})
    assert ("bad_images" in data) == (name in FILES)
    if name in FILES:
        assert data["bad_images"] == {"limit": 0.01, "evaluation": "fail"}
