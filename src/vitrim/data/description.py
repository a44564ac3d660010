"""What report.json says of the images of a run: how many there are, and a digest of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from torchvision.datasets.cifar import CIFAR10

from vitrim.data import Data
from vitrim.data.digits import Digits
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.image_files import ImageFiles
from vitrim.data.quarantine import StrictDataset, TolerantDataset


def describe_images(data: Data | None) -> dict[str, object]:
    """Return `classes`, the numbers of images, and `content`; empty where there are no images.

    `content` is a digest of the names (folder and file) and labels of the training and the
    validation images, the whole set where only some are used: the same folder moved elsewhere has
    the same one. Values are None where a data set does not tell.
    """
    if data is None:
        return {}
    known: dict[str, object] = {"training_images": None, "validation_images": None, "content": None}
    if isinstance(data, Digits):
        known["content"] = f"digits, {data.held_out:g} held out"
    if isinstance(data, ImageFiles):
        train = data.train.dataset if isinstance(data.train, FewShotSubset) else data.train
        parts = [_entries(part) for part in (train, data.val)]
        known["content"] = None if parts[1] is None else _digest(parts)
        known["training_images"] = 0 if data.train is None else len(data.train)
        known["validation_images"] = len(data.val if parts[1] is None else parts[1])
    return {"classes": data.n_classes, **known}


def _entries(images: object) -> list[str] | None:
    """Return a line per image, its name and label; None where they are not known."""
    if isinstance(images, TolerantDataset | StrictDataset):
        names = (name.replace(os.sep, "/").rsplit("/", 2)[-2:] for name in images.names)
        return [f"{'/'.join(n)} {label}" for n, label in zip(names, images.labels, strict=True)]
    if isinstance(images, CIFAR10):
        return [str(label) for label in images.targets]
    return None


def _digest(parts: Iterable[list[str] | None]) -> str:
    """Return 16 hex digits that identify lines, whatever their order in a part."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update("\n".join([*sorted(part or ()), "", ""]).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
