"""Data sets: what a run needs to know of one, and how its images reach a network."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lightning import LightningDataModule
from torch.utils.data import DataLoader


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """What a network wants its images to be: `size` in pixels, `mean` and `std` per channel."""

    channels: int
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float


class Loaders(LightningDataModule, ABC):
    """Batches of (images, labels): augmented for training, plain for validation and calibration."""

    @abstractmethod
    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[Any]:
        """Return training images without augmentation, in one order: `samples` of them, or all."""


def drawn(size: int, samples: int, seed: int) -> list[int]:
    """Return `samples` of `size` places, or all, drawn by `seed`, ascending."""
    return sorted(random.Random(seed).sample(range(size), min(samples, size)))


@runtime_checkable
class Data(Protocol):
    """A set of labelled images, split into training and validation."""

    n_classes: int
    trainable: bool

    @property
    def chosen(self) -> Sequence[str]:
        """Names of the training images, where only a few are drawn; else none."""
        ...

    def module(self, spec: ImageSpec) -> Loaders:
        """Return the loaders for a network that wants its images as `spec` says."""
        ...


def none(**settings: Any) -> None:
    """Return no data: the run then shows structure and skips every step that needs images.

    `settings` are what an experiment says of its images, and go unused here.
    """
