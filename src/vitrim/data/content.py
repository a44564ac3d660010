"""What a data set contains, in short: it is recognised wherever its files are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os.path import commonpath
from pathlib import Path

from torchvision.datasets import CIFAR10

from vitrim.data import Data
from vitrim.data.encoded import EncodedImages
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.image_files import ImageFiles
from vitrim.data.listing import noted
from vitrim.data.paths import ascending, checksum_of
from vitrim.data.quarantine import StrictDataset, TolerantDataset

MAX_SIZES = 1000
"""Files of a split whose sizes are compared, evenly spaced: more would take minutes on a network
file system."""
_AT_ONCE = 1000


def content(data: Data | None) -> Mapping[str, object] | None:
    """Return what tells the images of a data set from others, wherever they are stored.

    For each split that is the number of images, and a digest of their paths below the folder that
    they share, of their labels, and of the sizes in bytes of up to `MAX_SIZES` files. No image is
    read.

    Returns:
        One entry per split; empty where the data set does not tell; None without data.
    """
    if data is None:
        return None
    if not isinstance(data, ImageFiles):
        return {}
    train = data.train.dataset if isinstance(data.train, FewShotSubset) else data.train
    splits = {"training": train, "evaluation": data.val}
    contents = {split: _split(images) for split, images in splits.items() if images is not None}
    return {} if None in contents.values() else contents


def _split(images: object) -> dict[str, object] | None:
    if isinstance(images, TolerantDataset | StrictDataset):
        number = len(images.names)
        inside = images.dataset.files.size if isinstance(images.dataset, EncodedImages) else None
        return {"images": number, "digest": _digest(images.names, images.labels, inside)}
    if isinstance(images, CIFAR10):  # its files are checked against their MD5
        return {"images": len(images)}
    return None


def _digest(
    names: Sequence[str], labels: Sequence[int], inside: Callable[[int], int] | None = None
) -> str:
    """Return a digest of the files `names`, and of their labels.

    `inside` has their sizes by index where they lie in a larger file. The digest is that of
    [[[name, label], ...], [size, ...]] (`vitrim.files.digest`), without that list.
    """
    order = noted("order", names, None, lambda: _order(names))
    known = names if order is None else [names[index] for index in order]
    step = -(-len(known) // MAX_SIZES)
    sizes = [
        _size(known[at]) if inside is None else inside(at if order is None else order[at])
        for at in range(0, len(known), step)
    ]
    facts = [checksum_of(labels), sizes]
    in_order = labels if order is None else [labels[index] for index in order]
    return noted("content", names, facts, lambda: _digest_of(known, in_order, sizes))


def _order(names: Sequence[str]) -> list[int] | None:
    order = ascending(names)
    return None if isinstance(order, range) else [*order]


def _digest_of(names: Sequence[str], labels: Sequence[int], sizes: Sequence[int]) -> str:
    shared = len(commonpath([names[0], names[-1]]))
    content = hashlib.sha256(b"[[")
    entries = ([name[shared:], int(label)] for name, label in zip(names, labels, strict=True))
    for number, some in enumerate(_chunks(entries)):
        content.update(f"{', ' if number else ''}{json.dumps(some)[1:-1]}".encode())
    content.update(f"], {json.dumps(sizes)}]".encode())
    return content.hexdigest()[:8]


def _chunks(entries: Iterable[object]) -> Iterator[list[object]]:
    iterator = iter(entries)
    while some := [*islice(iterator, _AT_ONCE)]:
        yield some


def _size(name: str) -> int:
    """Return the bytes of a file; -1 where it cannot be found."""
    try:
        return Path(name).stat().st_size
    except OSError:
        return -1
