"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchvision.datasets import CIFAR10, CIFAR100

from vitrim.data.few_shot import few
from vitrim.data.images import Images
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
    workers: int,
    augmentation: Mapping[str, Any],
    mixing: Mapping[str, Any],
) -> Images:
    """Return CIFAR-10 or CIFAR-100 below `root`; `download: true` fetches it once.

    Of the training images, `samples` drawn by `samples_seed`, of all classes alike; None: all.

    Raises:
        ConfigError: `classes` is neither 10 nor 100, the files are missing or damaged, or
            there are not that many images.
    """
    if classes not in _SETS:
        raise ConfigError(f"data.classes={classes}: expected 10 or 100")
    try:
        train, val = (
            _SETS[classes](root, train=train, download=download) for train in (True, False)
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"data.root={root}: CIFAR-{classes} is not there ({error}); "
            "put its files there, or let data.download=true fetch them"
        ) from None
    if samples is not None:
        names = [f"train/{place:05}" for place in range(len(train))]
        train = few(
            train,
            classes=dict(enumerate(train.classes)),
            labels=train.targets,
            names=names,
            samples=samples,
            seed=samples_seed,
        )
    return Images(
        train=train,
        val=val,
        n_classes=classes,
        batch_size=batch_size,
        workers=workers,
        augmentation=augmentation,
        mixing=mixing,
    )
