"""Data sets: what a run needs to know about one, and how its images reach a network.

A data set is a dataclass or a function that returns one: `digits`, `imagefolder`, `cifar`,
`torchvision_sets`, `huggingface` and `webdataset`. `loader` makes batches that can be resumed,
`few_shot` draws a fixed number of training images, `defects` says what makes an image bad,
`quarantine` keeps bad images out of training and evaluation, and `bad_images` records those that a
run met.

May import: files, versions and errors. It knows neither networks nor jobs.
"""

from __future__ import annotations

import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from vitrim.data.dataset import MapDataset
from vitrim.data.kept import KeptImages
from vitrim.data.loader import (
    IN_THIS_PROCESS,
    ResumableBatchSampler,
    ResumableLoader,
    n_held_out,
    seed_all,
    sequential,
    subset,
)
from vitrim.data.loading import Loading
from vitrim.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """The images that a network expects: `size` in pixels, `mean` and `std` per channel."""

    channels: int
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float


class Loaders(LightningDataModule, ABC):
    """Batches of (images, labels): augmented for training, plain for validation and calibration.

    `seed` determines the order of training images and everything that is drawn for them. Training
    images whose index is in `left_out` are not trained on. `repeats` is the number of views of each
    image in an epoch of training (`ResumableBatchSampler`).
    """

    seed: int = 0
    left_out: Collection[int] = ()
    repeats: int = 1

    @abstractmethod
    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[object]:
        """Return `samples` training images, or all, without augmentation and in a fixed order.

        Every process gets all of them.
        """

    def augmented_dataloader(self, samples: int, seed: int) -> DataLoader[object]:
        """Return the images of `calibration_dataloader`; after the first epoch, augmented.

        From then on they are reshuffled in every epoch, and each is augmented again, as `seed`, the
        epoch and the image say (`vitrim.data.loader.plain_then_augmented`).

        Raises:
            ConfigError: this data set has no augmented images of that kind.
        """
        raise ConfigError(
            f"{type(self).__name__} has no augmented_dataloader: choose plain images, or a data "
            "set that has one"
        )

    def split_dataloaders(
        self, samples: int, seed: int, *, held_out: float, place: tuple[int, int]
    ) -> tuple[ResumableLoader, ResumableLoader]:
        """Return training images in two parts, neither of them augmented.

        Those to train on are the images of `calibration_dataloader(samples - held out, seed)`: who
        calibrates on them has not seen those that are held out.

        Args:
            samples: how many images at most, in both parts.
            seed: by which they are drawn.
            held_out: share of them in the second part, at least one image; 0: none.
            place: rank of this process, and the number of processes.

        Returns:
            Batches to train on, reshuffled in every epoch and shared out among the processes; and
            the images that are held out, in order and all of them in every process.

        Raises:
            ConfigError: there is one image only, or this data set's loader cannot be split.
        """
        all_images = self._all_images(seed)
        images, batch_size = all_images.images, all_images.batches.batch_size
        first, last = _split_indices(len(images), samples, seed, held_out)
        kept, kept_last = (self.kept_images(part) if len(part) else None for part in (first, last))
        batches = ResumableBatchSampler(
            len(first),
            batch_size=max(1, min(batch_size, len(first) // place[1])),
            seed=self.seed,
            shuffle=True,
            rank=place[0],
            world=place[1],
        )
        loading = all_images.loading
        training = ResumableLoader(subset(images, first), batches, loading=loading, kept=kept)
        held_out_images = subset(images, last)
        return training, sequential(held_out_images, batch_size, loading=loading, kept=kept_last)

    def kept_images(self, indices: Sequence[int]) -> KeptImages | None:
        """Return what keeps the plain training images at `indices` in memory; None: nothing."""
        return None

    def held_out_indices(self, samples: int, seed: int, held_out: float) -> list[int]:
        """Return which training images `split_dataloaders` holds out."""
        return _split_indices(len(self._all_images(seed).images), samples, seed, held_out)[1]

    def _all_images(self, seed: int) -> ResumableLoader:
        """Return all training images in order, not augmented."""
        all_images = self.calibration_dataloader(sys.maxsize, seed)
        if not isinstance(all_images, ResumableLoader):
            raise ConfigError(
                f"{type(self).__name__}.calibration_dataloader returns a "
                f"{type(all_images).__name__}, which cannot be split: expected a ResumableLoader "
                "(vitrim.data.loader.sequential)"
            )
        return all_images

    def on_before_batch_transfer(self, batch: object, dataloader_idx: int) -> object:
        """Seed what is drawn for a training batch, by mixup and cutmix and in the network."""
        if self.trainer is not None and self.trainer.training:
            done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            seed_all(self.seed, done, self.trainer.global_rank)
        return batch

    def shuffled(
        self, dataset: MapDataset, batch_size: int, *, loading: Loading = IN_THIS_PROCESS
    ) -> ResumableLoader:
        """Return full batches of `dataset` without `left_out`, reshuffled every epoch."""
        if self.left_out:
            dataset = subset(dataset, _all_but(len(dataset), self.left_out))
        return self._loader(dataset, batch_size, loading, shuffle=True)

    def in_order(
        self, dataset: MapDataset, batch_size: int, *, loading: Loading = IN_THIS_PROCESS
    ) -> ResumableLoader:
        """Return every item of `dataset` once, in order; the processes share them out."""
        return self._loader(dataset, batch_size, loading, shuffle=False)

    def _loader(
        self, dataset: MapDataset, batch_size: int, loading: Loading, *, shuffle: bool
    ) -> ResumableLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        size = len(dataset)
        largest = size // world // 2 * 2 or 1  # even: mixup and cutmix pair images
        batches = ResumableBatchSampler(
            size,
            batch_size=min(batch_size, largest) if shuffle else batch_size,
            seed=self.seed,
            shuffle=shuffle,
            rank=rank,
            world=world,
        )
        batches.repeats = self.repeats
        return ResumableLoader(dataset, batches, loading=loading)


def sample_indices(size: int, samples: int, seed: int) -> Sequence[int]:
    """Return `samples` of `size` indices, or all of them, drawn by `seed`, ascending."""
    if samples >= size:
        return range(size)
    return sorted(random.Random(seed).sample(range(size), samples))


def _all_but(size: int, indices: Collection[int]) -> Sequence[int]:
    """Return the other indices of `size`, ascending, without a Python object for each."""
    others = np.ones(size, dtype=bool)
    others[np.fromiter(indices, np.int64, len(indices))] = False
    return cast(Sequence[int], np.flatnonzero(others))


def _split_indices(
    size: int, samples: int, seed: int, held_out: float
) -> tuple[Sequence[int], list[int]]:
    """Return which of `size` images are trained on, and which are held out."""
    n = min(samples, size)
    n_last = n_held_out(n, held_out)
    if n_last >= n:
        raise ConfigError(
            f"{n} training image(s) cannot be split into some to train on and some that are held "
            "out: use more images (data.samples), or hold out none (held_out=0)"
        )
    first = sample_indices(size, n - n_last, seed)
    others = _all_but(size, first)
    return first, [int(others[i]) for i in sample_indices(len(others), n_last, seed)]


@runtime_checkable
class Data(Protocol):
    """A set of labelled images, split into training and validation."""

    @property
    def n_classes(self) -> int:
        """Number of labels."""
        ...

    @property
    def trainable(self) -> bool:
        """Whether there are training images."""
        ...

    @property
    def sample_names(self) -> Sequence[str]:
        """Names of the training images of a few-shot set; empty where all images are used."""
        ...

    def module(self, spec: ImageSpec) -> Loaders:
        """Return loaders for a network that expects images as in `spec`."""
        ...


def none(**settings: object) -> None:
    """Return no data: the run shows structure only and skips every step that needs images.

    `settings` are an experiment's settings of its images; they are not used here.
    """
