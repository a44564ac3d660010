"""Data sets of two splits whose images lie encoded in larger files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitrim.data.dataset import ImageDataset
from vitrim.data.encoded import EncodedImages
from vitrim.data.few_shot import few_shot
from vitrim.data.image_files import ImageFiles
from vitrim.data.loading import Loading, LoadingSettings
from vitrim.data.paths import Paths
from vitrim.data.quarantine import BadImageSettings, StrictDataset, TolerantDataset
from vitrim.errors import ConfigError, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSplit:
    """The images of a split.

    Args:
        images: with their labels.
        names: of all of them, as messages and quarantine.json have them.
        short_names: the same wherever the files are: few images are drawn by them.
    """

    images: EncodedImages
    names: Paths
    short_names: Paths


@dataclass(frozen=True, kw_only=True, slots=True)
class SetSettings:
    """What all sets of images take, as in conf/data/base/files.yaml."""

    samples: int | None
    samples_seed: int
    batch_size: int
    workers: int | str
    bad_images: BadImageSettings
    augmentation: Mapping[str, object]
    mixing: Mapping[str, object]
    loading: LoadingSettings


def image_set(
    train: EncodedSplit | None, val: EncodedSplit, classes: Sequence[str], settings: SetSettings
) -> ImageFiles:
    """Return a data set of two splits.

    Raises:
        ConfigError: there are fewer training images than data.samples, or a value cannot be.
        BadImages: too many training images, or one to evaluate on, are named after other classes.
    """
    return ImageFiles(
        train=None if train is None else _training_images(train, classes, settings),
        val=StrictDataset(
            val.images,
            labels=val.images.targets,
            names=val.names,
            evaluation=settings.bad_images["evaluation"],
        ),
        classes=tuple(classes),
        batch_size=settings.batch_size,
        loading=Loading(workers=settings.workers, **settings.loading),
        augmentation=settings.augmentation,
        mixing=settings.mixing,
    )


def _training_images(
    train: EncodedSplit, classes: Sequence[str], settings: SetSettings
) -> ImageDataset:
    labels = train.images.targets
    tolerant = TolerantDataset(
        train.images, labels=labels, names=train.names, limit=settings.bad_images["limit"]
    )
    if settings.samples is None:
        return tolerant
    return few_shot(
        tolerant,
        classes={label: classes[label] for label in {*map(int, labels)}},
        labels=labels,
        names=train.short_names,
        samples=settings.samples,
        seed=settings.samples_seed,
    )


def checked_splits(train: object, val: object, samples: int | None) -> dict[str, str]:
    """Return what the configuration names as the splits `train` (if any) and `val`.

    Raises:
        ConfigError: it is no text, or few images are to be drawn from no training images.
    """
    if train is None and samples is not None:
        raise ConfigError(
            f"data.samples={samples}: data.train=null names no training images to draw from"
        )
    named = {"val": val} if train is None else {"train": train, "val": val}
    for key, value in named.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"data.{key}={shown(value)}: expected the name of a split")
    return {key: str(value) for key, value in named.items()}
