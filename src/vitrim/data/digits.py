"""scikit-learn's 1,797 handwritten digits, 8x8 grey pixels: real data that needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from vitrim.data import ImageSpec, Loaders, drawn
from vitrim.data.loader import alike
from vitrim.errors import ConfigError, is_count, is_rate

_SIDE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Digits:
    """The digits, with a stratified share `held_out` for validation, always the same one."""

    batch_size: int
    held_out: float
    shift: float
    rotation: float
    label_smoothing: float
    n_classes: int = 10
    trainable: bool = True
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_rate(self.held_out) or not 0 < self.held_out < 1:
            raise ConfigError(f"data.held_out={self.held_out}: expected a share between 0 and 1")
        for name in ("shift", "rotation", "label_smoothing"):
            if not is_rate(getattr(self, name)):
                raise ConfigError(f"data.{name}={getattr(self, name)}: expected a number from 0 on")
        if not is_count(self.batch_size):
            raise ConfigError(
                f"data.batch_size={self.batch_size}: expected a whole number from 1 on"
            )

    def module(self, spec: ImageSpec) -> Loaders:
        """Return loaders of images (B, 1, 8, 8) normalised by `spec`."""
        if spec.size != (_SIDE, _SIDE) or spec.channels != 1:
            raise ConfigError(
                f"data=digits has grey images of {_SIDE}x{_SIDE} pixels, the model wants "
                f"{spec.channels} channels of {spec.size[0]}x{spec.size[1]}: use model=vit_digits, "
                "or another data="
            )
        return _Module(self, spec)


class _Module(Loaders):
    def __init__(self, digits: Digits, spec: ImageSpec) -> None:
        super().__init__()
        self.digits = digits
        source = load_digits()
        pixels = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
        images = (pixels - spec.mean[0]) / spec.std[0]
        self.background = float(images.min())
        labels = torch.tensor(source.target, dtype=torch.int64)
        rows = train_test_split(
            range(len(labels)), test_size=digits.held_out, stratify=labels, random_state=0
        )
        self.train_set, self.val_set = (TensorDataset(images[row], labels[row]) for row in rows)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the shuffled training batches; an incomplete last one is left out."""
        return self.shuffled(self.train_set, self.digits.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return every held-out image once."""
        return self.in_order(self.val_set, self.digits.batch_size)

    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[Any]:
        """Return `samples` training images, or all there are."""
        chosen = Subset(self.train_set, drawn(len(self.train_set), samples, seed))
        return alike(chosen, self.digits.batch_size)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Move and turn training images a little, soften their labels; leave validation alone."""
        trainer, digits = self.trainer, self.digits
        if trainer is None or not trainer.training:
            return batch
        images, labels = batch
        soft = mixup_target(labels, digits.n_classes, smoothing=digits.label_smoothing)
        moved = _jitter(images - self.background, digits.shift, digits.rotation)
        return moved + self.background, soft


def _jitter(images: Tensor, shift: float, rotation: float) -> Tensor:
    """Move each image by up to `shift` pixels and turn it by up to `rotation` degrees."""
    drawn = 2 * torch.rand(3, len(images), device=images.device) - 1
    x, y, angle = drawn * images.new_tensor([[2 * shift / _SIDE], [2 * shift / _SIDE], [rotation]])
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    affine = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
