"""A LightningDataModule of another package as a data set of a run.

The run takes the data sets, batch sizes, workers and collate functions of its loaders, and makes
the batches itself: those can be resumed exactly, and are shared out among processes. The module's
own hooks on batches are called. Methods that look at plain training images get them from its
`calibration_dataset()`; without that, they are those of training, augmented as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from vitrim.data import ImageSpec, Loaders, sample_indices
from vitrim.data.dataset import MapDataset
from vitrim.data.loader import ResumableLoader, sequential, subset
from vitrim.data.loading import Loading
from vitrim.errors import ConfigError, is_count

_CLASSES = ("num_classes", "n_classes")


@dataclass(frozen=True, slots=True)
class ModuleData:
    """The images of a LightningDataModule that is set up.

    Args:
        module_of: the LightningDataModule.
        train: its loader for training.
        val: its loader for validation.
        n_classes: number of labels.
    """

    module_of: LightningDataModule
    train: DataLoader[object]
    val: DataLoader[object]
    n_classes: int

    @classmethod
    def of(cls, module: LightningDataModule) -> ModuleData:
        """Return the data of a module: prepare and set it up.

        Raises:
            ConfigError: its loaders cannot be taken over, or it does not say how many classes
                there are.
        """
        name = type(module).__name__
        module.prepare_data()
        module.setup("fit")
        train, val = (
            _loader(getattr(module, f"{part}_dataloader")(), f"{name}.{part}_dataloader()")
            for part in ("train", "val")
        )
        numbers = [getattr(module, key, None) for key in _CLASSES]
        n_classes = next(filter(is_count, numbers), None)
        if n_classes is None:
            raise ConfigError(
                f"data: {name} has no {' or '.join(_CLASSES)}: add that attribute, the number of "
                "labels"
            )
        return cls(module, train, val, n_classes)

    @property
    def trainable(self) -> bool:
        """There are training images."""
        return True

    @property
    def sample_names(self) -> Sequence[str]:
        """Empty: all training images are used."""
        return ()

    def module(self, spec: ImageSpec) -> Loaders:
        """Return loaders of the module's images, which must be those that `spec` says.

        Raises:
            ConfigError: they have another shape.
        """
        name = type(self.module_of).__name__
        for part, loader in (("train", self.train), ("val", self.val)):
            _check_example(loader.dataset[0], spec, f"{name}.{part}_dataloader()")
        return _ModuleLoaders(self)


def _loader(loader: object, where: str) -> DataLoader[object]:
    """Return a loader of a module, once it is known that its batches can be made here."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = loader if not isinstance(loader, DataLoader) else loader.dataset
        raise ConfigError(
            f"data: {where} gives a {type(kind).__name__}: expected one DataLoader of a data set "
            "with __len__ and __getitem__"
        )
    if loader.batch_size is None or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        sampler = loader.batch_sampler if loader.batch_size is None else loader.sampler
        raise ConfigError(
            f"data: {where} has a {type(sampler).__name__}: a run draws batches itself, so that it "
            "can be resumed: leave the sampler out"
        )
    return loader


def _check_example(example: object, spec: ImageSpec, where: str) -> None:
    """Refuse examples other than pairs of an image of the network's shape and a label."""
    shape = (spec.channels, *spec.size)
    if not isinstance(example, tuple | list) or len(example) != 2:
        raise ConfigError(
            f"data: {where} has a {type(example).__name__} as its first example: expected a pair "
            "of an image and a class number"
        )
    image = example[0]
    found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
    if found != shape:
        raise ConfigError(
            f"data: {where} has images {found}, the network expects tensors {shape}: change the "
            "module's transforms, or model.image_size"
        )


class _ModuleLoaders(Loaders):
    """Batches of the data sets of a LightningDataModule, with its hooks."""

    def __init__(self, data: ModuleData) -> None:
        super().__init__()
        self.data = data
        calibration = getattr(data.module_of, "calibration_dataset", None)
        self.calibration_set = cast(
            MapDataset, data.train.dataset if calibration is None else calibration()
        )

    def train_dataloader(self) -> DataLoader[object]:
        """Return the shuffled training batches without an incomplete last one."""
        loader = self.data.train
        return _like(
            loader, self.shuffled(_images(loader), _size(loader), loading=_loading(loader))
        )

    def val_dataloader(self) -> DataLoader[object]:
        """Return every validation image once."""
        loader = self.data.val
        return _like(
            loader, self.in_order(_images(loader), _size(loader), loading=_loading(loader))
        )

    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[object]:
        """Return `samples` training images, or all of them."""
        loader = self.data.train
        indices = sample_indices(len(self.calibration_set), samples, seed)
        chosen = subset(self.calibration_set, indices)
        return sequential(chosen, _size(loader), loading=_loading(loader))

    def on_before_batch_transfer(self, batch: object, dataloader_idx: int) -> object:
        """Seed what is drawn for a training batch, then call the module's own hook."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return self._own().on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(
        self, batch: object, device: torch.device, dataloader_idx: int
    ) -> object:
        """Call the module's own hook."""
        return self._own().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: object, dataloader_idx: int) -> object:
        """Call the module's own hook."""
        return self._own().on_after_batch_transfer(batch, dataloader_idx)

    def _own(self) -> LightningDataModule:
        """Return the module, which asks the trainer whether it trains."""
        self.data.module_of.trainer = cast(Trainer, self.trainer)
        return self.data.module_of


def _images(loader: DataLoader[object]) -> MapDataset:
    images: Dataset[Any] = loader.dataset
    return cast(MapDataset, images)


def _size(loader: DataLoader[object]) -> int:
    return cast(int, loader.batch_size)


def _loading(loader: DataLoader[object]) -> Loading:
    return Loading(workers=loader.num_workers)


def _like(loader: DataLoader[object], own: ResumableLoader) -> ResumableLoader:
    """Return the run's loader with the functions of the module's."""
    own.collate_fn = loader.collate_fn
    own.worker_init_fn = loader.worker_init_fn
    return own
