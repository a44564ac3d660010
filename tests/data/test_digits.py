from __future__ import annotations

from typing import Any

import pytest
import torch

from vitrim.data import ImageSpec
from vitrim.data.digits import Digits, _jitter
from vitrim.errors import ConfigError

SPEC = ImageSpec(
    channels=1, size=(8, 8), mean=(0.5,), std=(0.5,), interpolation="bicubic", crop_pct=1.0
)
DIGITS = Digits(batch_size=64, held_out=0.2, shift=0.25, rotation=5.0, label_smoothing=0.1)


def test_a_fifth_is_held_out_and_never_trained_on() -> None:
    first, second = (DIGITS.module(SPEC) for _ in range(2))
    assert len(first.val_set) == 360
    assert len(first.train_set) == 1437
    assert torch.equal(first.val_set.tensors[0], second.val_set.tensors[0])
    assert torch.bincount(first.val_set.tensors[1]).min() >= 34


def test_an_image_that_does_not_move_stays_as_it_is() -> None:
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(_jitter(images, 0.0, 0.0), images)


def test_moving_by_a_pixel_moves_by_a_pixel() -> None:
    torch.manual_seed(0)
    images = torch.zeros(200, 1, 8, 8)
    images[:, 0, 4, 4] = 1.0
    moved = _jitter(images, 1.0, 0.0)
    assert moved[:, :, 3:6, 3:6].sum((1, 2, 3)).min() > 0.99
    assert moved[:, 0, 4, 4].min() < 0.3


def test_calibration_takes_training_images_as_they_are() -> None:
    module = DIGITS.module(SPEC)
    drawn = torch.cat([images for images, _ in module.calibration_dataloader(100, seed=0)])
    assert drawn.shape == (100, 1, 8, 8)
    everything = torch.cat([images for images, _ in module.calibration_dataloader(10**6, seed=0)])
    assert torch.equal(everything, module.train_set.tensors[0])


def test_augmented_digits_are_plain_first_then_moved_by_seed_epoch_and_image() -> None:
    module = DIGITS.module(SPEC)
    plain = [images for images, _ in module.calibration_dataloader(100, seed=1)]

    def epochs(seed: int) -> list[list[torch.Tensor]]:
        loader = module.augmented_dataloader(100, seed=seed)
        seen = []
        for epoch in range(3):
            loader.batches.set_epoch(epoch)
            seen.append([images for images, _ in loader])
        return seen

    first, second, third = epochs(1)
    assert all(torch.equal(one, other) for one, other in zip(first, plain, strict=True))
    assert [len(batch) for batch in second] == [len(batch) for batch in plain]
    assert not torch.equal(torch.cat(second), torch.cat(third))
    assert not set(map(key, torch.cat(second))) & set(map(key, torch.cat(first)))
    again = epochs(1)[2]
    assert all(torch.equal(one, other) for one, other in zip(third, again, strict=True))
    loader = module.augmented_dataloader(100, seed=1)
    loader.load_state_dict({"epoch": 2, "given": 1})
    assert torch.equal(next(iter(loader))[0], third[1])
    assert all(
        torch.equal(one, other) for (one, _), other in zip(loader.first_epoch(), plain, strict=True)
    )


def key(image: torch.Tensor) -> bytes:
    return image.numpy().tobytes()


@pytest.mark.parametrize(
    "constant", [{"n_classes": 5}, {"trainable": False}, {"sample_names": ("a",)}]
)
def test_constants_are_no_settings(constant: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        Digits(
            batch_size=64,
            held_out=0.2,
            shift=0.25,
            rotation=5.0,
            label_smoothing=0.1,
            **constant,
        )
    assert (DIGITS.n_classes, DIGITS.trainable, DIGITS.sample_names) == (10, True, ())


def test_every_wrong_setting_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"data\.held_out=1\.5: .*; data\.batch_size=0: "):
        Digits(batch_size=0, held_out=1.5, shift=0.25, rotation=5.0, label_smoothing=0.1)
