"""Loaders of image files, with timm's transforms, mixup and cutmix."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import (
    AugmentOp,
    AugMixAugment,
    AutoAugment,
    RandAugment,
    posterize,
)
from timm.data.mixup import mixup_target
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose
from torchvision.transforms.v2 import functional

from vitrim.data import ImageSpec, Loaders, sample_indices
from vitrim.data.augmentation import Augmentation, Drawn
from vitrim.data.dataset import Example, ImageDataset, LabelledImages, MapDataset, Transform
from vitrim.data.encoded import EncodedImages
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.folders import ImageList
from vitrim.data.kept import KeptImages, KeptSets
from vitrim.data.loader import IN_THIS_PROCESS, plain_then_augmented, sequential, subset
from vitrim.data.loading import Loading, cores
from vitrim.data.quarantine import StrictDataset, TolerantDataset
from vitrim.errors import ConfigError, is_count

BACKENDS = ("pil", "tensor")
"""What augments training images: timm on Pillow's images, or `vitrim.data.augmentation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFiles:
    """A training and a validation set of image files, with how they are augmented and loaded.

    Args:
        train: the training images, labelled from 0; None where there are none.
        val: the validation images, labelled in the same way.
        classes: the name of every output of a network, in order.
        batch_size: images in a batch.
        loading: by which processes, and how.
        augmentation: training options of `timm.data.create_transform`, and the `backend`: "pil",
            timm's own, or "tensor" (`vitrim.data.augmentation`).
        mixing: options of `timm.data.Mixup`.
        outputs: the output of a network that every label of `train` and `val` stands for; None
            where they are the same.
        listing: version of the rules that found and labelled the images: 1 if those of version
            0.1.0 give the same images and labels.
    """

    train: ImageDataset | None
    val: ImageDataset
    classes: Sequence[str]
    batch_size: int
    loading: Loading
    augmentation: Mapping[str, object]
    mixing: Mapping[str, object]
    outputs: Mapping[int, int] | None = None
    listing: int = 1

    def __post_init__(self) -> None:
        if not is_count(self.batch_size):
            raise ConfigError(
                f"data.batch_size={self.batch_size}: expected a whole number, at least 1 image"
            )
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"data.augmentation.backend={self.backend}: expected {' or '.join(BACKENDS)}"
            )
        if self.mixes_pairs and self.batch_size % 2:
            raise ConfigError(
                f"data.batch_size={self.batch_size}: expected an even number, "
                "because mixup and cutmix pair images"
            )

    @property
    def n_classes(self) -> int:
        """Number of outputs of a network."""
        return len(self.classes)

    @property
    def present(self) -> list[str]:
        """Names of the classes that have images, in the order of their labels."""
        return [self.classes[label] for label in self._labels()]

    def relabelled(self, classes: Sequence[str], outputs: Sequence[int]) -> ImageFiles:
        """Return the same images for a network with other outputs.

        Args:
            classes: the name of every output.
            outputs: the index of the output of each class in `present`.
        """
        by_label = dict(zip(self._labels(), outputs, strict=True))
        return replace(self, classes=tuple(classes), outputs=by_label)

    def evaluation_only(self) -> ImageFiles:
        """Return the validation images alone."""
        return replace(self, train=None)

    def _labels(self) -> list[int]:
        sets = (self.train, self.val)
        found = [np.unique(_labels(images)) for images in sets if images is not None]
        labels: list[int] = np.unique(np.concatenate(found)).tolist()
        return labels

    @property
    def backend(self) -> object:
        """What augments training images: "pil" or "tensor"."""
        return self.augmentation.get("backend", "pil")

    @property
    def trainable(self) -> bool:
        """Whether there are training images."""
        return self.train is not None

    @property
    def sample_names(self) -> Sequence[str]:
        """Names of the training images of a few-shot set; empty where all images are used."""
        return self.train.names if isinstance(self.train, FewShotSubset) else ()

    @property
    def mixes_pairs(self) -> bool:
        """Whether mixup or cutmix is on, which mix training images in pairs."""
        return bool(self.mixing["mixup_alpha"] or self.mixing["cutmix_alpha"])

    def bad_images(self) -> dict[str, dict[str, str]]:
        """Return why images that were met so far are bad, by split and name."""
        train = self.train.dataset if isinstance(self.train, FewShotSubset) else self.train
        reasons = {
            split: dataset.bad_images()
            for split, dataset in (("training", train), ("evaluation", self.val))
            if isinstance(dataset, TolerantDataset | StrictDataset)
        }
        return {split: names for split, names in reasons.items() if names}

    def module(self, spec: ImageSpec) -> Loaders:
        """Return loaders of images (B, C, H, W) prepared as in `spec`."""
        if spec.channels != 3:
            raise ConfigError(
                f"image files have 3 channels, the model expects {spec.channels}: choose a model "
                "of 3 channels, or another data="
            )
        return _ImageLoaders(self, spec)


class _ImageLoaders(Loaders):
    def __init__(self, images: ImageFiles, spec: ImageSpec) -> None:
        super().__init__()
        self.images = images
        options: dict[str, object] = {
            "input_size": (spec.channels, *spec.size),
            "interpolation": spec.interpolation,
            "mean": tuple(spec.mean),
            "std": tuple(spec.std),
        }
        plain: Transform = create_transform(**options, crop_pct=spec.crop_pct)
        as_pixels = images.loading.decoder == "torchvision"
        if as_pixels:
            plain = _on_pixels(cast(Compose, plain))
        self.val_set = _prepared(images.val, plain, images.outputs, as_pixels=as_pixels)
        self.train_set = self.augmented_set = self.augmentation = None
        self.calibration_set: MapDataset | None = None
        if images.train is not None:
            settings = {k: v for k, v in images.augmentation.items() if k != "backend"}
            augmented = _training_transform(**options, **settings)
            self.augmented_set = self.train_set = _prepared(images.train, augmented, images.outputs)
            if images.backend == "tensor":
                self.augmentation = Augmentation({**options, **settings})
                self.train_set = _prepared(
                    images.train, self.augmentation, images.outputs, as_pixels=True
                )
            self.calibration_set = _prepared(
                images.train, plain, images.outputs, as_pixels=as_pixels
            )
        self.kept = KeptSets(4 * spec.channels * prod(spec.size))
        self.mix = (
            Mixup(num_classes=images.n_classes, **images.mixing) if images.mixes_pairs else None
        )

    def train_dataloader(self) -> DataLoader[object]:
        """Return the shuffled, augmented training batches without an incomplete last one."""
        assert self.train_set is not None
        _decode_few(self.train_set, self.images.loading)
        return self.shuffled(self.train_set, self.images.batch_size, loading=self.images.loading)

    def val_dataloader(self) -> DataLoader[object]:
        """Return every validation image once."""
        return self.in_order(self.val_set, self.images.batch_size, loading=self.images.loading)

    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[object]:
        """Return `samples` training images, or all, prepared like validation images."""
        assert self.calibration_set is not None
        indices = sample_indices(len(self.calibration_set), samples, seed)
        chosen, kept = subset(self.calibration_set, indices), self.kept_images(indices)
        is_few = isinstance(self.images.train, FewShotSubset)
        loading = IN_THIS_PROCESS if is_few and kept is not None else self.images.loading
        return sequential(chosen, self.images.batch_size, loading=loading, kept=kept)

    def kept_images(self, indices: Sequence[int]) -> KeptImages | None:
        """Return what keeps the plain images at `indices`; None: they are too many."""
        return self.kept.of(indices)

    def augmented_dataloader(self, samples: int, seed: int) -> DataLoader[object]:
        """Return these images, after the first epoch augmented as `augmentation` says, unmixed."""
        assert self.augmented_set is not None
        assert self.calibration_set is not None
        indices = sample_indices(len(self.calibration_set), samples, seed)
        plain, augmented = (
            subset(images, indices) for images in (self.calibration_set, self.augmented_set)
        )
        batch_size, loading = self.images.batch_size, self.images.loading
        _decode_few(self.augmented_set, loading)
        return plain_then_augmented(
            plain,
            augmented,
            batch_size,
            seed=seed,
            loading=loading,
            kept=self.kept_images(indices),
        )

    def transfer_batch_to_device(
        self, batch: tuple[Tensor | Drawn, Tensor], device: torch.device, dataloader_idx: int
    ) -> tuple[Tensor | Drawn, Tensor]:
        """Move images and labels; what was drawn for them is needed on the CPU."""
        images, labels = batch
        if isinstance(images, Tensor):
            moved: tuple[Tensor, Tensor] = super().transfer_batch_to_device(
                batch, device, dataloader_idx
            )
            return moved
        pixels = images["pixels"].to(device, non_blocking=True)
        return {**images, "pixels": pixels}, labels.to(device, non_blocking=True)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor | Drawn, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Finish the augmentation; mix training images in pairs and soften their labels.

        Images for validation are left unchanged.
        """
        drawn, labels = batch
        if isinstance(drawn, Tensor):
            images = drawn
        else:
            assert self.augmentation is not None
            images = self.augmentation.finish(drawn)
        if self.images.loading.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return images, labels
        if self.mix is not None:
            return cast(tuple[Tensor, Tensor], self.mix(images, labels))
        smoothing = self.images.mixing["label_smoothing"]
        return images, mixup_target(labels, self.images.n_classes, smoothing=smoothing)


class _Relabelled(Dataset[Example]):
    """The images of `dataset`, with the outputs of a network as labels."""

    def __init__(self, dataset: ImageDataset, outputs: Mapping[int, int]) -> None:
        self.dataset = dataset
        self.outputs = outputs

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        image, label = self.dataset[index]
        return image, self.outputs[label]


def _labels(dataset: object) -> Sequence[int]:
    """Return the labels of the classes of `dataset`, without decoding any image."""
    match dataset:
        case FewShotSubset():
            return _labels(dataset.dataset)
        case TolerantDataset() | StrictDataset():
            return dataset.labels
    targets: Sequence[int] = dataset.targets  # type: ignore[attr-defined]
    return targets


def _prepared(
    dataset: ImageDataset,
    transform: Transform,
    outputs: Mapping[int, int] | None,
    *,
    as_pixels: bool = False,
) -> LabelledImages:
    """Return a copy of `dataset` that shares its images; `as_pixels`: decoded by torchvision."""
    dataset = _as_pixels(dataset) if as_pixels else copy.copy(dataset)
    dataset.transform = transform
    return dataset if outputs is None else _Relabelled(dataset, outputs)


def _as_pixels(dataset: Any) -> Any:
    """Return a copy of `dataset` whose images, if they are files, are read as tensors."""
    dataset = copy.copy(dataset)
    match dataset:
        case ImageList() | EncodedImages():
            dataset.as_pixels = True
        case FewShotSubset() | TolerantDataset() | StrictDataset():
            dataset.dataset = _as_pixels(dataset.dataset)
            if isinstance(dataset, FewShotSubset):
                dataset.forget()
    return dataset


def _decode_few(dataset: object, loading: Loading) -> None:
    """Decode few images here, before there are workers, which would each decode all of them."""
    match dataset:
        case _Relabelled():
            _decode_few(dataset.dataset, loading)
        case FewShotSubset() if loading.n_workers:
            dataset.decode(cores())


def _on_pixels(transform: Compose) -> Transform:
    """Return timm's transform for evaluation, for images in uint8 on which it works as well."""
    steps = [
        partial(functional.to_dtype, dtype=torch.float32, scale=True)
        if isinstance(step, MaybeToTensor)
        else step
        for step in transform.transforms
    ]
    return cast(Transform, Compose([_pixels, *steps]))


def _pixels(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else cast(Tensor, functional.pil_to_tensor(image))


def _training_transform(**options: object) -> Transform:
    """Return timm's training transform, with a posterising that no Pillow refuses."""
    transform: Compose = create_transform(is_training=True, **options)
    for operation in _operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return cast(Transform, transform)


def _operations(transform: Compose) -> Iterator[AugmentOp]:
    """Yield the operations that timm's automatic augmentations draw from."""
    for step in transform.transforms:
        match step:
            case RandAugment() | AugMixAugment():
                yield from step.ops
            case AutoAugment():
                for operations in step.policy:
                    yield from operations


def _posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    """Keep the highest `bits` of every channel; 0 bits, an error in Pillow 13, give black."""
    if bits > 0:
        return cast(Image.Image, posterize(image, bits))
    return Image.new(image.mode, image.size)
