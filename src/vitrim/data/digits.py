"""scikit-learn's 1,797 handwritten digits, 8x8 grey pixels: real data that needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from vitrim.data import ImageSpec
from vitrim.errors import ConfigError

_SIDE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Digits:
    """The digits, with a stratified share `held_out` for validation, always the same one."""

    batch_size: int
    held_out: float
    n_classes: int = 10
    trainable: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"data.held_out={self.held_out}: expected a share between 0 and 1")
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size={self.batch_size}: expected at least 1")

    def module(self, spec: ImageSpec) -> LightningDataModule:
        """Return loaders of images (B, 1, 8, 8) normalised by `spec`."""
        if spec.size != (_SIDE, _SIDE) or spec.channels != 1:
            raise ConfigError(
                f"data=digits has grey images of {_SIDE}x{_SIDE} pixels, the model wants {spec.channels} "
                f"channels of {spec.size[0]}x{spec.size[1]}: use model=vit_digits, or another data="
            )
        return _Module(self, spec)


class _Module(LightningDataModule):
    def __init__(self, digits: Digits, spec: ImageSpec) -> None:
        super().__init__()
        self.batch_size = digits.batch_size
        source = load_digits()
        pixels = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
        images = (pixels - spec.mean[0]) / spec.std[0]
        labels = torch.tensor(source.target, dtype=torch.int64)
        rows = train_test_split(
            range(len(labels)), test_size=digits.held_out, stratify=labels, random_state=0
        )
        self.train_set, self.val_set = (TensorDataset(images[row], labels[row]) for row in rows)

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Return the shuffled training batches."""
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Return every held-out image once."""
        return DataLoader(self.val_set, batch_size=self.batch_size)
