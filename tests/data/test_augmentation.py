"""Augmentation of tensors is timm's: the same draws, and pixels that differ by rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from nets import MIXED, fit, images_in
from vitrim.data import ImageSpec
from vitrim.data.augmentation import Augmentation
from vitrim.data.image_files import ImageFiles, _training_transform
from vitrim.data.loader import _seed_host
from vitrim.errors import ConfigError
from vitrim.trainer.classify import Classify
from vitrim.trainer.recipe import Recipe

SIZE = 32
OPTIONS: dict[str, Any] = {
    "input_size": (3, SIZE, SIZE),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
}
SPEC = ImageSpec(
    channels=3, size=(SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic",
    crop_pct=0.9,
)  # fmt: skip
LEVEL = 1 / 255 / 0.2  # of the first channel, after normalisation


def smooth(number: int, height: int = 48, width: int = 64) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(number, 3, 5, 7, generator=generator)
    pixels = F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1).mul(255).byte()
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


def augmented(options: dict[str, Any], images: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """Return what timm's transform and what tensors make of the images, from the same draws."""
    by_timm, on_tensors = _training_transform(**options), Augmentation(options)
    expected, drawn = [], []
    for index, image in enumerate(images):
        _seed_host(0, 1, index)
        expected.append(by_timm(image))
        _seed_host(0, 1, index)
        drawn.append(on_tensors(image))
    return torch.stack(expected), on_tensors.finish(default_collate(drawn))


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_augment": None, "color_jitter": 0.0},
        {"auto_augment": None, "color_jitter": [0.4, 0.0, 0.3], "vflip": 0.5},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "rand-m7-n3-p1.0-mstd101", "interpolation": "bilinear"},
        {"auto_augment": "rand-m9-n1-t3aw-inc1", "interpolation": "random"},
        {"auto_augment": "original"},
        {"auto_augment": "v0-mstd0.5", "ratio": (1.0, 1.0), "scale": (0.5, 0.6)},
        {"auto_augment": "3a", "color_jitter": 0.3},
        {"auto_augment": None, "re_prob": 0.7, "re_count": 3, "hflip": 0.0},
    ],
    ids=str,
)
def test_the_draws_are_timms_and_pixels_differ_by_rounding(settings: dict[str, Any]) -> None:
    expected, found = augmented({**OPTIONS, **settings}, smooth(24))
    errors = (found - expected).abs().mean((1, 2, 3)) / LEVEL
    assert float(errors.median()) < 1  # levels
    assert float(errors.max()) < 12  # where equal levels are spread


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_boxes_are_timms_and_their_pixels_are_drawn_by_the_image(mode: str) -> None:
    options = {**OPTIONS, "auto_augment": None, "color_jitter": None, "re_prob": 1.0}
    blank, _ = augmented({**options, "re_mode": "const"}, smooth(4))
    _, found = augmented({**options, "re_mode": mode}, smooth(4))
    _, again = augmented({**options, "re_mode": mode}, smooth(4)[:2])
    assert torch.equal(found[:2], again)  # whatever else is in the batch
    erased = (blank == 0).all(1)
    inside = found.permute(0, 2, 3, 1)[erased]
    assert abs(float(inside.mean())) < 1.5
    assert (len(inside.unique(dim=0)) > 100) == (mode == "pixel")


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_augment": "augmix-m3-w3"}, {"grayscale_prob": 0.2}, {"gaussian_blur_prob": 0.1},
        {"color_jitter": [0.1, 0.1, 0.1, 0.1]}, {"train_crop_mode": "rkrc"}, {"no_aug": True},
        {"color_jitter_prob": 0.5}, {"re_num_splits": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_tensors_cannot_do_is_refused(settings: dict[str, Any]) -> None:
    (key,) = settings
    with pytest.raises(ConfigError, match=rf"data\.augmentation\.{key}=.*backend=pil"):
        Augmentation({**OPTIONS, **settings})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            for index, image in enumerate(smooth(8)[4 * label : 4 * label + 4]):
                image.save(tmp_path / split / name / f"{index}.jpg", quality=95)
    return tmp_path


def opened(root: Path, backend: str, **changes: Any) -> ImageFiles:
    augmentation = {
        "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "re_prob": 0.0,
        "backend": backend,
    }  # fmt: skip
    return images_in(root, augmentation=augmentation, **changes)


def batches(images: ImageFiles, start: int = 0) -> list[Tensor]:
    """Return the batches of the second epoch from one on, as training sees them."""
    loaders = images.module(SPEC)
    loader = loaders.train_dataloader()
    loader.batches.set_epoch(1)  # type: ignore[attr-defined]
    loader.batches.start = start  # type: ignore[attr-defined]
    return [loaders.on_after_batch_transfer(batch, 0)[0] for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_pil_and_resume_exactly(root: Path, workers: int) -> None:
    found = batches(opened(root, "tensor", workers=workers))
    assert len(found) == 2
    for ours, theirs in zip(found, batches(opened(root, "pil")), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).abs().mean()) < 3 * 2 / 255
    (resumed,) = batches(opened(root, "tensor"), start=1)
    assert torch.equal(resumed, found[1])


def test_batches_are_in_uint8_until_they_are_on_the_device(root: Path) -> None:
    images = opened(root, "tensor", loading={"channels_last": True})
    loaders = images.module(SPEC)
    drawn, labels = next(iter(loaders.train_dataloader()))
    assert (drawn["pixels"].dtype, drawn["pixels"].shape) == (torch.uint8, (4, 3, SIZE, SIZE))
    moved, _ = loaders.transfer_batch_to_device((drawn, labels), torch.device("meta"), 0)
    assert moved["pixels"].device.type == "meta"
    assert moved["operations"].device.type == "cpu"
    batch, _ = loaders.on_after_batch_transfer((drawn, labels), 0)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_bad_image_is_replaced_as_before(root: Path) -> None:
    path = root / "train" / "a" / "1.jpg"
    path.write_bytes(path.read_bytes()[:400])
    settings = {"bad_images": {"limit": 1, "evaluation": "fail"}}
    images = opened(root, "tensor", **settings)
    assert all(len(batch) == 4 for batch in batches(images))
    reasons = images.bad_images()["training"]
    batches(by_timm := opened(root, "pil", **settings))
    assert reasons == by_timm.bad_images()["training"]
    assert list(reasons) == [str(path)]


def test_a_network_is_trained_on_mixed_images(root: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 2))
    recipe = Recipe(epochs=2, lr=1e-3, weight_decay=0.0, warmup_epochs=0.0, clip_norm=0.0)
    before = net[1].weight.clone()
    fit(
        Classify(net, recipe=recipe, n_classes=2), opened(root, "tensor", mixing=MIXED).module(SPEC)
    )
    assert net[1].weight.isfinite().all()
    assert not torch.equal(net[1].weight, before)


@pytest.mark.parametrize("samples", [None, 4])
def test_evaluation_and_unlabelled_images_stay_timms(root: Path, samples: int | None) -> None:
    ours, theirs = (opened(root, name, samples=samples).module(SPEC) for name in ("tensor", "pil"))
    for kind in ("val_dataloader", "calibration_dataloader", "augmented_dataloader"):
        arguments = () if kind == "val_dataloader" else (4, 0)
        for (a, _), (b, _) in zip(
            getattr(ours, kind)(*arguments), getattr(theirs, kind)(*arguments), strict=True
        ):
            assert torch.equal(a, b)


def test_the_fast_decoder_evaluates_nearly_the_same_images(root: Path) -> None:
    fast = opened(root, "tensor", loading={"decoder": "torchvision"}).module(SPEC)
    exact = opened(root, "tensor").module(SPEC)
    for (a, _), (b, _) in zip(fast.val_dataloader(), exact.val_dataloader(), strict=True):
        assert 0 < float((a - b).abs().mean()) < 2 / 255


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": -1}, r"data\.workers=-1: expected auto"),
        ({"workers": "many"}, r"data\.workers=many: expected auto"),
        ({"loading": {"prefetch_factor": 2}}, r"prefetch_factor=2: expected null, or with workers"),
        ({"loading": {"pin_memory": "yes"}}, r"data\.loading\.pin_memory=yes: expected auto"),
        ({"loading": {"channels_last": 1}}, r"data\.loading\.channels_last=1: expected true"),
        ({"loading": {"decoder": "cv2"}}, r"data\.loading\.decoder=cv2: expected pil or"),
    ],
)
def test_loading_that_cannot_be_is_refused(root: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(root, "pil", **changes)


def test_an_unknown_backend_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.augmentation\.backend=gpu: expected pil or ten"):
        opened(root, "gpu")
