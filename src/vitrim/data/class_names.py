"""Names of classes: their order, and which of them are used.

Labels are ranks among the names in `ordered`, as torchvision's ImageFolder gives them, with two
exceptions: names 0 to n-1 are ordered as numbers (ImageNetV2), and where all names are wnids of
ImageNet-1k, labels are those of ImageNet, whatever folders are missing.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import yaml
from timm.data import ImageNetInfo

from vitrim.data.defects import WNID
from vitrim.data.folders import first
from vitrim.errors import ConfigError

_INTEGER = re.compile(r"0|[1-9]\d*")


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """Return the wnids of ImageNet-1k, in the order of its labels."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def ordered(names: Iterable[str], among: Iterable[str] = ()) -> list[str]:
    """Return names in the order of their labels; `among` are all names of the set, if more.

    >>> ordered(["1", "10", "2"]), ordered(["10", "2"], among=map(str, range(11)))
    (['1', '10', '2'], ['2', '10'])
    """
    by_text = sorted(set(names))
    return sorted(by_text, key=int) if is_numbered(set(among) or by_text) else by_text


def is_numbered(names: Iterable[str]) -> bool:
    """Whether the names are the numbers from 0 to n-1."""
    names = {*names}
    return names == {*map(str, range(len(names)))}


def is_ambiguous(names: Sequence[str]) -> bool:
    """Whether the names are numbers that are in another order as texts, and do not begin at 0."""
    names = [*names]
    if is_numbered(names) or not all(map(_INTEGER.fullmatch, names)):
        return False
    return sorted(names) != sorted(names, key=int)


def label_index(
    folders: Sequence[str], classes: object, class_seed: int
) -> tuple[dict[str, int], int]:
    """Return the label of every class that is used, and the number of labels.

    Args:
        folders: names of the class folders.
        classes: None for all, a number of classes to draw, or a list of names.
        class_seed: of that draw.

    Raises:
        ConfigError: there are no such classes, or two differ in capital letters only.
    """
    names: Sequence[str]
    if isinstance(classes, list | tuple):
        names = ordered(_listed(classes, folders), among=folders)
    else:
        names = _all_classes(folders) if classes is None else _drawn(folders, classes, class_seed)
        _refuse_look_alikes(set(names) & set(folders))
    return {name: label for label, name in enumerate(names)}, len(names)


def _drawn(folders: Sequence[str], classes: object, class_seed: int) -> Sequence[str]:
    """Return a number of classes, drawn with a seed."""
    if type(classes) is not int or not 1 <= classes <= len(folders):
        raise ConfigError(
            f"data.classes={classes}: expected null (all), a list of names, or a number from 1 to "
            f"{len(folders)}, the number of class folders ({first(ordered(folders))})"
        )
    names = random.Random(class_seed).sample(sorted(folders), classes)
    return ordered(names, among=folders)


def _all_classes(folders: Sequence[str]) -> Sequence[str]:
    """Return the classes of ImageNet-1k if all folders are among them, else the folders."""
    others = [name for name in folders if not WNID.fullmatch(name)]
    if 0 < len(others) < len(folders):
        raise ConfigError(
            f"data.root: some folders are named after wnids, these are not: {others[:3]}; remove "
            "them, or list the classes to use in data.classes"
        )
    wnids = imagenet_wnids()
    return wnids if set(folders) <= set(wnids) else ordered(folders)


def _listed(values: Sequence[object], folders: Sequence[str]) -> list[str]:
    """Return the folders that a list in the configuration names."""
    found = [_folders_of(value, folders) for value in values]
    missing = [value for value, names in zip(values, found, strict=True) if not names]
    if missing or not values or not folders:
        typed = [value for value in missing if not isinstance(value, str)]
        quoting = (
            "; YAML reads numbers, true, false and null without quotes as no text: write "
            f"\"data.classes=['{folders[0]}', ...]\""
        )
        raise ConfigError(
            f"data.classes: no folder for {missing[:3]}; there are {first(folders)}"
            f"{quoting if typed else ''}"
        )
    for value, names in zip(values, found, strict=True):
        if len(names) > 1:
            raise ConfigError(
                f"data.classes: {value} could be any of the folders {first(names)}: write the name "
                "in quotes"
            )
    chosen = [names[0] for names in found]
    repeated = ordered(name for name in chosen if chosen.count(name) > 1)
    if repeated:
        raise ConfigError(f"data.classes: listed more than once: {first(repeated)}")
    return chosen


def split_name(key: str, value: object, folders: Sequence[str]) -> str:
    """Return the folder of a split that the configuration names, which YAML may read as a number.

    Raises:
        ConfigError: the value is no text, and it is not clear which folder it names.
    """
    names = [value] if isinstance(value, str) else _folders_of(value, folders)
    if len(names) != 1:
        raise ConfigError(
            f"data.{key}={value}: expected the name of a folder; there are {first(folders)}; write "
            f"it in quotes, as in \"data.{key}='{value}'\""
        )
    return names[0]


def _folders_of(value: object, folders: Sequence[str]) -> list[str]:
    """Return the folders that a value of YAML may name: `001` is the number 1 there."""
    if isinstance(value, str):
        return [value] if value in folders else []
    return [
        name
        for name in folders
        if any(type(read) is type(value) and read == value for read in _readings(name))
    ]


@cache
def _readings(name: str) -> tuple[object, ...]:
    """Return what YAML and Hydra read where a name stands without quotes."""
    readings: list[object] = []
    try:
        readings.append(yaml.safe_load(name))
    except (yaml.YAMLError, ValueError):
        readings.append(name)
    if re.fullmatch(r"[+-]?\d+(_\d+)*", name):
        readings.append(int(name))
    elif re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", name, re.IGNORECASE):
        readings.append(float(name))
    words: Mapping[str, object] = {"true": True, "false": False, "null": None}
    if name.lower() in words:
        readings.append(words[name.lower()])
    return tuple(readings)


def _refuse_look_alikes(names: Iterable[str]) -> None:
    """Refuse classes whose names differ in capital letters, spaces or Unicode forms only."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        key = unicodedata.normalize("NFKC", name).casefold().strip()
        if key in seen:
            raise ConfigError(
                f"data.root: the class folders {seen[key]!r} and {name!r} differ in capital "
                "letters or spaces only: merge or rename them, or list the classes in data.classes"
            )
        seen[key] = name
