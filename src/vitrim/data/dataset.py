"""The kinds of data sets that loaders and wrappers accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Example = tuple[object, int]
"""An image, or what a transform makes of it, and its label."""
Transform = Callable[[Any], object]
"""A function of one image."""


class MapDataset(Protocol):
    """A map-style data set of any items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


class LabelledImages(Protocol):
    """A map-style data set of images and their labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class ImageDataset(LabelledImages, Protocol):
    """Labelled images with an exchangeable transform, as torchvision's data sets have it."""

    transform: Transform | None


def transformed(example: Example, transform: Transform | None) -> Example:
    """Return `example` with its image transformed; unchanged where there is no transform."""
    image, label = example
    return (image if transform is None else transform(image)), label
