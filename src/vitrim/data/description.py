"""What report.json says of the images of a run: how many there are, and a digest of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

from torchvision.datasets.cifar import CIFAR10

from vitrim.data import Data
from vitrim.data.digits import Digits
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.image_files import ImageFiles
from vitrim.data.listing import noted
from vitrim.data.paths import Paths, ascending, checksum_of
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
        known["content"] = _content(train, data.val)
        known["training_images"] = 0 if data.train is None else len(data.train)
        known["validation_images"] = len(data.val.names if _is_known(data.val) else data.val)
    return {"classes": data.n_classes, **known}


def _content(train: object, val: object) -> str | None:
    """Return the digest of both splits, from the last time if they are many."""
    if _is_known(train) and _is_known(val):
        facts = [checksum_of(train.labels), checksum_of(val.labels), Paths.of(val.names).checksum()]
        return noted("description", train.names, facts, lambda: _digest([*_lines(train, val)]))
    parts = [*_lines(train, val)]
    return None if parts[1] is None else _digest(parts)


def _lines(*splits: object) -> Iterator[Sequence[str] | None]:
    return map(_entries, splits)


def _is_known(images: object) -> TypeGuard[TolerantDataset | StrictDataset]:
    return isinstance(images, TolerantDataset | StrictDataset)


def _entries(images: object) -> Sequence[str] | None:
    """Return a line per image, its name and label; None where they are not known."""
    if _is_known(images):
        names = (name.replace(os.sep, "/").rsplit("/", 2)[-2:] for name in images.names)
        lines = (f"{'/'.join(n)} {label}" for n, label in zip(names, images.labels, strict=True))
        return Paths.of(lines)
    if isinstance(images, CIFAR10):
        return [str(label) for label in images.targets]
    return None


def _digest(parts: Iterable[Sequence[str] | None]) -> str:
    """Return 16 hex digits that identify lines, whatever their order in a part."""
    digest = hashlib.sha256()
    for part in parts:
        lines = part or ()
        order = ascending(lines)
        for line in lines if isinstance(order, range) else (lines[index] for index in order):
            digest.update(f"{line}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()[:16]
