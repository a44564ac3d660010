"""Loaders for sets of image files: timm's transforms, mixup and cutmix around them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import VisionDataset

from vitrim.data import ImageSpec, Loaders, drawn
from vitrim.data.few_shot import Few
from vitrim.data.loader import alike
from vitrim.errors import ConfigError, is_count

if TYPE_CHECKING:
    from vitrim.data.quarantine import Replacing, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """A training and a validation set of image files, with how they are augmented and loaded.

    `augmentation` is passed on to `timm.data.create_transform`; `mixing` to `timm.data.Mixup`.
    """

    train: VisionDataset | Replacing | Few | None
    val: VisionDataset | Strict
    n_classes: int
    batch_size: int
    workers: int
    augmentation: Mapping[str, Any]
    mixing: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not is_count(self.batch_size) or not (self.workers == 0 or is_count(self.workers)):
            raise ConfigError(
                f"data.batch_size={self.batch_size}, data.workers={self.workers}: "
                "expected whole numbers, at least 1 image and 0 workers"
            )
        if self.blends and self.batch_size % 2:
            raise ConfigError(
                f"data.batch_size={self.batch_size}: expected an even number, "
                "because mixup and cutmix pair images"
            )

    @property
    def trainable(self) -> bool:
        """Whether there are training images."""
        return self.train is not None

    @property
    def chosen(self) -> Sequence[str]:
        """Names of the training images, where only a few are drawn."""
        return self.train.names if isinstance(self.train, Few) else ()

    @property
    def blends(self) -> bool:
        """Whether training images are blended in pairs."""
        return bool(self.mixing["mixup_alpha"] or self.mixing["cutmix_alpha"])

    def module(self, spec: ImageSpec) -> Loaders:
        """Return loaders of images (B, C, H, W) prepared as `spec` says."""
        if spec.channels != 3:
            raise ConfigError(f"the model wants {spec.channels} channels, image files have 3")
        return _Module(self, spec)


class _Module(Loaders):
    def __init__(self, images: Images, spec: ImageSpec) -> None:
        super().__init__()
        self.images = images
        prepare = {
            "input_size": (spec.channels, *spec.size),
            "interpolation": spec.interpolation,
            "mean": tuple(spec.mean),
            "std": tuple(spec.std),
        }
        self.train_set = None if images.train is None else copy.copy(images.train)
        if self.train_set is not None:
            self.train_set.transform = _augmented(**prepare, **images.augmentation)
        plain = create_transform(**prepare, crop_pct=spec.crop_pct)
        self.val_set = copy.copy(images.val)
        self.val_set.transform = plain
        self.calibration_set = copy.copy(images.train)
        if self.calibration_set is not None:
            self.calibration_set.transform = plain
        self.mix = Mixup(num_classes=images.n_classes, **images.mixing) if images.blends else None

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the shuffled, augmented training batches; an incomplete last batch is left out."""
        assert self.train_set is not None
        return self.shuffled(self.train_set, self.images.batch_size, workers=self.images.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return every validation image once."""
        return self.in_order(self.val_set, self.images.batch_size, workers=self.images.workers)

    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[Any]:
        """Return `samples` training images, or all there are, as validation images are prepared."""
        assert self.calibration_set is not None
        chosen = Subset(self.calibration_set, drawn(len(self.calibration_set), samples, seed))
        return alike(chosen, self.images.batch_size, workers=self.images.workers)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> Any:
        """Blend training images in pairs and soften their labels; leave validation alone."""
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return batch
        images, labels = batch
        smoothing = self.images.mixing["label_smoothing"]
        if self.mix is not None:
            return self.mix(images, labels)
        return images, mixup_target(labels, self.images.n_classes, smoothing=smoothing)


def _augmented(**options: Any) -> Any:
    """Return timm's training transform, but for its posterising, which Pillow can refuse."""
    transform: Any = create_transform(is_training=True, **options)
    for step in transform.transforms:
        sets = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for operation in (operation for some in sets for operation in some):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the highest bits of every channel; of none is left black, an error in Pillow 13."""
    if bits > 0:
        return posterize(image, bits)  # type: ignore[no-any-return]
    return Image.new(image.mode, image.size)
