"""What a data set contains, in short: it is recognised wherever its files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import commonpath
from pathlib import Path

from torchvision.datasets import CIFAR10

from vitrim.data import Data
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.image_files import ImageFiles
from vitrim.data.quarantine import StrictDataset, TolerantDataset
from vitrim.files import digest

MAX_SIZES = 1000
"""Files of a split whose sizes are compared, evenly spaced: more would take minutes on a network
file system."""


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
        return {"images": number, "digest": _digest(images.names, images.labels)}
    if isinstance(images, CIFAR10):  # its files are checked against their MD5
        return {"images": len(images)}
    return None


def _digest(names: Sequence[str], labels: Sequence[int]) -> str:
    """Return a digest of the files `names`, and of their labels."""
    shared = commonpath([min(names), max(names)])
    files = sorted(zip(names, labels, strict=True))
    entries = [[name[len(shared) :], int(label)] for name, label in files]
    step = -(-len(files) // MAX_SIZES)
    return digest([entries, [_size(name) for name, _ in files[::step]]])


def _size(name: str) -> int:
    """Return the bytes of a file; -1 where it cannot be found."""
    try:
        return Path(name).stat().st_size
    except OSError:
        return -1
