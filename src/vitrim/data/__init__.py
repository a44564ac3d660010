"""Data sets: what a run needs to know of one, and how its images reach a network."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from vitrim.data.loader import Batches, Order, seed_all


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
    """Batches of (images, labels): augmented for training, plain for validation and calibration.

    `seed` decides on the order of training images and on all that is drawn for them.
    """

    seed: int = 0

    @abstractmethod
    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[Any]:
        """Return training images without augmentation, in one order: `samples` of them, or all.

        Of several processes each gets all of them.
        """

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Seed what is drawn for a training batch, in blending it as in the network."""
        if self.trainer is not None and self.trainer.training:
            done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            seed_all(self.seed, done, self.trainer.global_rank)
        return batch

    def shuffled(self, dataset: Dataset[Any], batch_size: int, *, workers: int = 0) -> Batches:
        """Return full batches of `dataset`, in another order every epoch."""
        return self._batches(dataset, batch_size, workers, shuffle=True)

    def in_order(self, dataset: Dataset[Any], batch_size: int, *, workers: int = 0) -> Batches:
        """Return every item of `dataset` once; of several processes each has its share."""
        return self._batches(dataset, batch_size, workers, shuffle=False)

    def _batches(
        self, dataset: Dataset[Any], batch_size: int, workers: int, *, shuffle: bool
    ) -> Batches:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        size: int = len(dataset)  # type: ignore[arg-type]
        most = size // world // 2 * 2 or 1  # even: mixup and cutmix pair images
        order = Order(
            size,
            batch_size=min(batch_size, most) if shuffle else batch_size,
            seed=self.seed,
            shuffle=shuffle,
            rank=rank,
            world=world,
        )
        return Batches(dataset, order, workers=workers)


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
