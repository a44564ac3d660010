"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision."""

from __future__ import annotations

from collections.abc import Mapping

from torchvision.datasets import CIFAR10, CIFAR100

from vitrim.data.few_shot import few_shot
from vitrim.data.image_files import ImageFiles
from vitrim.data.loading import DEFAULTS, Loading, LoadingSettings
from vitrim.errors import ConfigError

_SETS = {10: CIFAR10, 100: CIFAR100}


def cifar(
    *,
    classes: int,
    root: str,
    download: bool,
    samples: int | None,
    samples_seed: int,
    batch_size: int,
    workers: int | str,
    augmentation: Mapping[str, object],
    mixing: Mapping[str, object],
    loading: LoadingSettings = DEFAULTS,
) -> ImageFiles:
    """Return CIFAR-10 or CIFAR-100 below `root`; `download=True` downloads it once.

    `samples` is the size of a class-balanced random subset of the training images, drawn by
    `samples_seed`; None uses all of them.

    Raises:
        ConfigError: `classes` is neither 10 nor 100, the files are missing or damaged, or
            there are fewer images than `samples`.
    """
    if classes not in _SETS:
        raise ConfigError(f"data.classes={classes}: expected 10 or 100")
    try:
        train, val = (
            _SETS[classes](str(root), train=train, download=download) for train in (True, False)
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"data.root={root}: no CIFAR-{classes} ({error}); "
            "put its files there, or download them with data.download=true"
        ) from None
    train_classes = train.classes
    if samples is not None:
        train = few_shot(
            train,
            classes=dict(enumerate(train_classes)),
            labels=train.targets,
            names=[f"train/{index:05}" for index in range(len(train))],
            samples=samples,
            seed=samples_seed,
        )
    return ImageFiles(
        train=train,
        val=val,
        classes=tuple(train_classes),
        batch_size=batch_size,
        loading=Loading(workers=workers, **loading),
        augmentation=augmentation,
        mixing=mixing,
    )
