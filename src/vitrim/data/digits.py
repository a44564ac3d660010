"""scikit-learn's 1,797 handwritten digits, 8x8 grey pixels: real data without a download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from vitrim.data import ImageSpec, Loaders, sample_indices
from vitrim.data.loader import plain_then_augmented, sequential
from vitrim.errors import ConfigError, is_count, is_rate, require

_SIDE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Digits:
    """The digits, with a fixed stratified fraction `held_out` for validation."""

    batch_size: int
    held_out: float
    shift: float
    rotation: float
    label_smoothing: float

    def __post_init__(self) -> None:
        number = "a number from 0 on"
        require(
            "data",
            self,
            (
                "held_out",
                is_rate(self.held_out) and 0 < self.held_out < 1,
                "a share between 0 and 1",
            ),
            ("shift", is_rate(self.shift), number),
            ("rotation", is_rate(self.rotation), number),
            ("label_smoothing", is_rate(self.label_smoothing), number),
            ("batch_size", is_count(self.batch_size), "a whole number from 1 on"),
        )

    @property
    def n_classes(self) -> int:
        """Ten digits."""
        return 10

    @property
    def classes(self) -> Sequence[str]:
        """The names of the digits."""
        return tuple(map(str, range(10)))

    @property
    def trainable(self) -> bool:
        """There are training images."""
        return True

    @property
    def sample_names(self) -> Sequence[str]:
        """Empty: all training images are used."""
        return ()

    def module(self, spec: ImageSpec) -> Loaders:
        """Return loaders of images (B, 1, 8, 8) normalised as in `spec`."""
        if spec.size != (_SIDE, _SIDE) or spec.channels != 1:
            raise ConfigError(
                f"data=digits has grey images of {_SIDE}x{_SIDE} pixels, the model wants "
                f"{spec.channels} channels of {spec.size[0]}x{spec.size[1]}: use model=vit_digits, "
                "or another data="
            )
        return _DigitsLoaders(self, spec)


class _DigitsLoaders(Loaders):
    def __init__(self, digits: Digits, spec: ImageSpec) -> None:
        super().__init__()
        self.digits = digits
        pixels, labels = _pixels_and_labels()
        images = (pixels - spec.mean[0]) / spec.std[0]
        self.background = float(images.min())
        rows = train_test_split(
            range(len(labels)), test_size=digits.held_out, stratify=labels, random_state=0
        )
        self.train_set, self.val_set = (TensorDataset(images[row], labels[row]) for row in rows)

    def train_dataloader(self) -> DataLoader[object]:
        """Return the shuffled training batches without an incomplete last one."""
        return self.shuffled(self.train_set, self.digits.batch_size)

    def val_dataloader(self) -> DataLoader[object]:
        """Return every held-out image once."""
        return self.in_order(self.val_set, self.digits.batch_size)

    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[object]:
        """Return `samples` training images, or all of them."""
        indices = sample_indices(len(self.train_set), samples, seed)
        return sequential(Subset(self.train_set, indices), self.digits.batch_size)

    def augmented_dataloader(self, samples: int, seed: int) -> DataLoader[object]:
        """Return these images, after the first epoch each of them shifted and rotated."""
        indices = sample_indices(len(self.train_set), samples, seed)
        plain = Subset(self.train_set, indices)
        moved = _MovedDigits(plain, self.digits, self.background)
        return plain_then_augmented(plain, moved, self.digits.batch_size, seed=seed)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Shift and rotate training images, soften their labels; leave validation unchanged."""
        trainer, digits = self.trainer, self.digits
        if trainer is None or not trainer.training:
            return batch
        images, labels = batch
        soft = mixup_target(labels, digits.n_classes, smoothing=digits.label_smoothing)
        moved = _jitter(images - self.background, digits.shift, digits.rotation)
        return moved + self.background, soft


class _MovedDigits(Dataset[tuple[Tensor, Tensor]]):
    """The digits of `plain`, each shifted and rotated at random when it is read."""

    def __init__(
        self, plain: Dataset[tuple[Tensor, ...]], digits: Digits, background: float
    ) -> None:
        self.plain = plain
        self.digits = digits
        self.background = background

    def __len__(self) -> int:
        return len(self.plain)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.plain[index]
        shift, rotation = self.digits.shift, self.digits.rotation
        (moved,) = _jitter((image - self.background)[None], shift, rotation)
        return moved + self.background, label


@cache  # the text file takes longer to read than a batch to classify
def _pixels_and_labels() -> tuple[Tensor, Tensor]:
    """Return all digits (1797, 1, 8, 8), from 0 to 1, and their labels (1797,)."""
    source = load_digits()
    pixels = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
    return pixels, torch.tensor(source.target, dtype=torch.int64)


def _jitter(images: Tensor, shift: float, rotation: float) -> Tensor:
    """Shift each image by up to `shift` pixels and rotate it by up to `rotation` degrees."""
    offsets = 2 * torch.rand(3, len(images), device=images.device) - 1
    x, y, angle = offsets * images.new_tensor(
        [[2 * shift / _SIDE], [2 * shift / _SIDE], [rotation]]
    )
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    affine = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
