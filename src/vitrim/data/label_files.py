"""Labels of images that lie in one folder, from a file: `data.val_labels`.

Two forms are read. A line per image with its name (or its name without extension) and its label,
separated by a comma, a tab, a semicolon or a space; a header is skipped. Or a label per line, in
the order of the images' names, as in ILSVRC2012_validation_ground_truth.txt.

A label is the name of a class, or a number. Beside a name, a number is the index of a class from 0.
Alone on its line, it counts from 0 where 0 occurs, else from 1. ILSVRC's own numbers have an order
of their own, which is in the meta.mat of its development kit: it has to lie beside the file.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitrim.data.class_names import imagenet_wnids
from vitrim.data.defects import WNID
from vitrim.data.folders import first
from vitrim.errors import ConfigError

_MAX_BYTES = 2**28
_META = "meta.mat"


def read_labels(path: Path, images: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Return the name of the class of every image.

    Args:
        path: the file with the labels.
        images: paths of the images, in the order of their names.
        classes: names of the classes, in the order of their labels; empty where only the file says.

    Raises:
        ConfigError: the file cannot be read, leaves an image without a label, or names a class that
            does not exist.
    """
    rows = _rows(path)
    by_name = _by_name(images)
    is_paired = any(len(row) > 1 and row[0] in by_name for row in rows)
    labels = _paired(path, rows, by_name) if is_paired else _in_order(path, rows, images)
    missing = [Path(image).name for image in images if image not in labels]
    if missing:
        raise ConfigError(
            f"data.val_labels={path}: no label for {len(missing):,} of the {len(images):,} images: "
            f"{first(missing)}"
        )
    names = _class_names(path, [*labels.values()], classes, is_paired=is_paired)
    return dict(zip(labels, names, strict=True))


def _rows(path: Path) -> list[list[str]]:
    """Return the fields of every line that is not empty."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"data.val_labels={path}: expected at most {_MAX_BYTES:,} bytes")
        lines = path.read_text("utf-8-sig").splitlines()
        return [_fields(line) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"data.val_labels={path}: expected a text file of labels ({error})"
        ) from None


def _fields(line: str) -> list[str]:
    """Return the name and the label in a line, or the label alone.

    >>> _fields("a b.png,cat"), _fields("a.png 3"), _fields("7")
    (['a b.png', 'cat'], ['a.png', '3'], ['7'])
    """
    for separator in (",", "\t", ";"):
        if separator in line:
            return [field.strip() for field in next(csv.reader([line], delimiter=separator))]
    return [field.strip() for field in line.strip().rsplit(maxsplit=1)]


def _by_name(images: Sequence[str]) -> dict[str, str]:
    """Return the path of an image by its name, and by its name without extension, if unique."""
    names = Counter(name for image in images for name in _names(image))
    return {name: image for image in images for name in _names(image) if names[name] == 1}


def _names(image: str) -> set[str]:
    path = Path(image)
    return {path.name, path.stem}


def _paired(
    path: Path, rows: Sequence[Sequence[str]], by_name: Mapping[str, str]
) -> dict[str, str]:
    """Return the label of every image that a line names."""
    labels: dict[str, str] = {}
    for name, *fields in rows:
        image = by_name.get(name) or by_name.get(Path(name).name)
        if image is None or not fields:
            continue  # a header, or one of the images that are not here
        label = fields[0] if not WNID.match(fields[0]) else fields[0].split()[0]
        if labels.setdefault(image, label) != label:
            raise ConfigError(
                f"data.val_labels={path}: two labels for {name}: {labels[image]} and {label}"
            )
    return labels


def _in_order(path: Path, rows: Sequence[Sequence[str]], images: Sequence[str]) -> dict[str, str]:
    """Return the label of every image where the lines have labels only."""
    if len(rows) != len(images):
        names = [Path(image).name for image in images]
        raise ConfigError(
            f"data.val_labels={path}: {len(rows):,} lines for {len(images):,} images "
            f"({first(names)}): expected a label for every image in the order of their names, or "
            "lines of FILE,LABEL"
        )
    if sorted(images, key=_natural) != [*images]:
        raise ConfigError(
            f"data.val_labels={path}: the order of {first(Path(image).name for image in images)} "
            "is ambiguous (as texts or as numbers): write lines of FILE,LABEL"
        )
    return {image: " ".join(row) for image, row in zip(images, rows, strict=True)}


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key that orders numbers in texts by their value."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _class_names(
    path: Path, labels: Sequence[str], classes: Sequence[str], *, is_paired: bool
) -> Sequence[str]:
    """Return the names of classes that labels stand for."""
    known = set(classes)
    if known and {*labels} <= known:
        return labels
    if all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        return _of_numbers(path, numbers, classes, is_paired=is_paired)
    wnids = {*imagenet_wnids()}
    strangers = sorted({*labels} - (wnids if known <= wnids else known))
    if known and strangers:
        raise ConfigError(
            f"data.val_labels={path}: no class of the training images is named {first(strangers)}; "
            f"there are {first(classes)}"
        )
    return labels


def _of_numbers(
    path: Path, numbers: Sequence[int], classes: Sequence[str], *, is_paired: bool
) -> Sequence[str]:
    """Return the names of classes that numbers stand for."""
    largest, wnids = max(numbers), imagenet_wnids()
    if not is_paired and (path.parent / _META).is_file():
        return _of_ilsvrc(path.parent / _META, numbers)
    if largest >= len(classes) and {*classes} <= {*wnids}:
        classes = wnids if classes else ()
    begin = 0 if is_paired or 0 in numbers else 1
    if begin == 1 and (largest == len(wnids) or not classes or largest != len(classes)):
        raise ConfigError(
            f"data.val_labels={path}: numbers from {min(numbers)} to {largest} do not say which "
            f"classes they are ({len(classes):,} have a folder): ILSVRC's numbers need the "
            f"{_META} of its development kit beside the file; others write lines of FILE,CLASS"
        )
    if classes and largest - begin >= len(classes):
        raise ConfigError(
            f"data.val_labels={path}: the number {largest} is no index of the {len(classes):,} "
            f"classes, which count from 0: {first(classes)}"
        )
    return [classes[n - begin] if classes else str(n) for n in numbers]


def _of_ilsvrc(meta: Path, numbers: Sequence[int]) -> Sequence[str]:
    """Return the wnids of ILSVRC's numbers by the table of its development kit."""
    from scipy.io import loadmat

    try:
        table = loadmat(meta, squeeze_me=True)["synsets"]
        wnids = {int(number): str(wnid) for number, wnid, *_ in table.tolist()}
        return [wnids[number] for number in numbers]
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{meta}: not the table of ILSVRC's development kit ({error})") from None
