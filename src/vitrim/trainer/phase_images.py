"""The images of a phase: what it trains on, and what it is validated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from vitrim.data import Loaders
from vitrim.data.loader import ResumableLoader
from vitrim.jobs import distributed
from vitrim.trainer.phase import AllButHeldOut, AugmentedImages, HoldsOut, Phase, SplitImages


def training_batches(
    phase: Phase, data: Loaders, *, seed: int, repeats: int
) -> DataLoader[object] | None:
    """Return batches of the images that a phase asks for; hand over those that are held out.

    None: the batches are those of the training set, without those to be left out.

    Args:
        phase: its `calibration_images` say which.
        data: where the images come from; it is told which to leave out, and `repeats`.
        seed: by which few images are drawn.
        repeats: views of each image in an epoch of the training set.
    """
    data.left_out, data.repeats = (), repeats
    match phase.calibration_images:
        case None:
            return None
        case AllButHeldOut(of=split):
            data.left_out = data.held_out_indices(split.images, seed, split.held_out)
            return None
        case AugmentedImages(images=images):
            return data.augmented_dataloader(images, seed)
        case SplitImages(images=images, held_out=share):
            assert isinstance(phase, HoldsOut)
            training, held_out = data.split_dataloaders(
                images, seed, held_out=share, place=distributed.place()
            )
            phase.hold_out(cast(Iterable[Sequence[Tensor]], held_out))
            return training
        case images:
            return data.calibration_dataloader(images, seed)


@contextmanager
def kept_on(device: torch.device, loader: DataLoader[object] | None) -> Iterator[None]:
    """Let images that a loader keeps in memory lie on a device, where they fit."""
    if not isinstance(loader, ResumableLoader):
        yield
        return
    loader.place_on(device)
    try:
        yield
    finally:
        loader.place_on(torch.device("cpu"))


def validation_batches(data: Loaders, trainer: Trainer) -> DataLoader[object]:
    """Return the validation images, which the processes of `trainer` share out."""
    data.trainer = trainer
    images: DataLoader[object] = data.val_dataloader()
    return images
