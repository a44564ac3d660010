"""Flowers-102 (Nilsback and Zisserman, 2008) and Oxford-IIIT Pets (2012) through torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset
from torchvision.datasets import Flowers102, OxfordIIITPet, VisionDataset

from vitrim.data.few_shot import Few, few
from vitrim.data.images import Images
from vitrim.data.quarantine import Replacing, strict
from vitrim.errors import ConfigError

_SETS: Mapping[str, tuple[Callable[..., VisionDataset], tuple[str, ...]]] = {
    "flowers102": (Flowers102, ("train", "val")),
    "pets": (OxfordIIITPet, ("trainval",)),
}
"""How each is opened, and which splits are trained on; the one named test is for validation."""


class _Joined(ConcatDataset[tuple[Any, int]]):
    """Splits as one set, with the labels and files of all their images."""

    def __init__(self, parts: Sequence[VisionDataset]) -> None:
        super().__init__(parts)
        self.classes: list[str] = parts[0].classes
        self.labels = [label for part in parts for label in part._labels]  # opens no image
        kept = "_image_files" if isinstance(parts[0], Flowers102) else "_images"
        self.names = [str(path) for part in parts for path in getattr(part, kept)]


def fine(
    *,
    name: str,
    root: str,
    download: bool,
    samples: int | None,
    samples_seed: int,
    batch_size: int,
    workers: int,
    bad_images: Mapping[str, Any],
    augmentation: Mapping[str, Any],
    mixing: Mapping[str, Any],
) -> Images:
    """Return the set `name` below `root`; `download: true` fetches it once.

    Of the training images, `samples` drawn by `samples_seed`, of all classes alike; None: all.

    Raises:
        ConfigError: no set of that name, its files are missing or damaged, or there are not that
            many images.
    """
    if name not in _SETS:
        raise ConfigError(f"data.name={name}: expected {' or '.join(_SETS)}")
    opens, splits = _SETS[name]
    try:
        train, val = (
            _Joined([opens(root, split=split, download=download) for split in part])
            for part in (splits, ("test",))
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"data.root={root}: {name} is not there ({error}); "
            "put its files there, or let data.download=true fetch them"
        ) from None
    labelled = {"labels": train.labels, "names": train.names}
    tolerant = Replacing(train, **labelled, limit=bad_images["limit"])
    chosen: Replacing | Few = tolerant
    if samples is not None:
        names = [f"train/{place:05}" for place in range(len(train))]
        chosen = few(
            tolerant,
            classes=dict(enumerate(train.classes)),
            labels=train.labels,
            names=names,
            samples=samples,
            seed=samples_seed,
        )
    return Images(
        train=chosen,
        val=strict(val, labels=val.labels, names=val.names, evaluation=bad_images["evaluation"]),
        n_classes=len(train.classes),
        batch_size=batch_size,
        workers=workers,
        augmentation=augmentation,
        mixing=mixing,
    )
