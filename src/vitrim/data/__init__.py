"""Data sets: what a run needs to know of one, and how its images reach a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning import LightningDataModule


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """What a network wants its images to be: `size` in pixels, `mean` and `std` per channel."""

    channels: int
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float


@runtime_checkable
class Data(Protocol):
    """A set of labelled images, split into training and validation."""

    n_classes: int
    trainable: bool

    def module(self, spec: ImageSpec) -> LightningDataModule:
        """Return the loaders for a network that wants its images as `spec` says."""
        ...


def none() -> None:
    """Return no data: the run then shows structure and skips every step that needs images."""
