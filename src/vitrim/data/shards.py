"""Tar files of images and labels, as webdataset writes them: listed once, then read at any place.

Members that follow each other and have one name up to its first dot are a sample; the rest of the
names says what they are (`n01440764_1.jpg`, `n01440764_1.cls`). The list of many samples is kept in
the user's cache folder while the sizes and times of all files are as before.
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vitrim.data.folders import first
from vitrim.data.listing import DAMAGED, KEPT_FROM, cache_folder, one_at_a_time, save_arrays
from vitrim.data.paths import Labels, Paths, are_sound
from vitrim.errors import ConfigError
from vitrim.files import digest, own_folder, write

_log = logging.getLogger(__name__)
_FORMAT = 1
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
_END = bytes(2 * tarfile.BLOCKSIZE)
_SETTLED_NS = 2 * 10**9
_MAX_LABEL = 20  # bytes


class Keys(NamedTuple):
    """What members of a sample are called: its image is the first of `images` that it has."""

    images: tuple[str, ...]
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The images of some tar files, in the order of the files and of their members.

    Args:
        shards: the files, sorted.
        names: of all images, as TAR/MEMBER; they begin with the folder of the set.
        shard: by image the index of its file, (n).
        place: by image where it begins in its file, and its size in bytes, (n, 2).
        labels: of all images, (n).
    """

    shards: Sequence[str]
    names: Paths
    shard: np.ndarray
    place: np.ndarray
    labels: Labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        """Return the content of an image file.

        Raises:
            OSError: the tar file cannot be read.
            ValueError: it is shorter than when it was listed.
        """
        begin, size = self.place[index].tolist()
        with Path(self.shards[self.shard[index]]).open("rb") as file:
            file.seek(begin)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{self.shards[self.shard[index]]} ends within this image")
        return content

    def size(self, index: int) -> int:
        """Return the bytes of an image file."""
        return int(self.place[index, 1])


def read_samples(folder: Path, shards: Sequence[Path], keys: Keys) -> Samples:
    """List the samples of tar files below a folder, or return the list that is kept.

    Of several processes on a machine that begin together, one lists and the others read.

    Raises:
        ConfigError: a file is damaged, a sample has no label, or a member is there twice.
    """
    states = [path.stat() for path in shards]
    facts = [[s.st_size, s.st_mtime_ns] for s in states]
    key = digest([_FORMAT, str(folder), [*map(str, shards)], facts, [*keys.images], keys.label])
    place = cache_folder()
    if place is None:
        return _listed(folder, shards, keys)
    path = place / f"shards-{key}.npz"
    with one_at_a_time(path):
        known = _kept(path, folder, shards)
        if known is not None:
            return known
        begun = time.time_ns()
        found = _listed(folder, shards, keys)
        settled = max(s.st_mtime_ns for s in states) < begun - _SETTLED_NS
        if len(found) >= KEPT_FROM and settled:
            with suppress(OSError, ValueError):
                own_folder(place)
                write(path, lambda part: save_arrays(part, _arrays(found)))
    return found


def _arrays(samples: Samples) -> dict[str, np.ndarray]:
    names = samples.names
    return {
        "buffer": names.buffer,
        "bounds": names.bounds,
        "shard": samples.shard,
        "place": samples.place,
        "labels": samples.labels,
    }


def _kept(path: Path, folder: Path, shards: Sequence[Path]) -> Samples | None:
    """Return the list that is kept, or None: there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = Paths(f"{folder}{os.sep}", arrays["buffer"], arrays["bounds"])
            shard, place, labels = arrays["shard"], arrays["place"], arrays["labels"]
        number = len(names)
        sound = (
            (shard.shape, place.shape, labels.shape) == ((number,), (number, 2), (number,))
            and are_sound(names)
            and 0 <= shard.min() <= shard.max() < len(shards)
            and bool((place >= 0).all())
            and labels.min() >= 0
        )
    except DAMAGED as error:
        _log.info("%s: not a list of samples, listed again (%s)", path, error)
        return None
    if not sound:
        return None
    texts = [*map(str, shards)]
    return Samples(shards=texts, names=names, shard=shard, place=place, labels=labels)


def _listed(folder: Path, shards: Sequence[Path], keys: Keys) -> Samples:
    """List the samples of all files, one after the other."""
    prefix = f"{folder}{os.sep}"
    names: list[Paths] = []
    numbers: list[np.ndarray] = []
    for number, path in enumerate(shards):
        samples = [*_samples(path, keys)]
        if not samples:
            raise ConfigError(
                f"{path}: has no sample with a member {' or '.join(keys.images)}: write it again, "
                "leave it out, or name the members in data.image_keys"
            )
        names.append(Paths.of((f"{path}/{name}" for name, *_ in samples), prefix=prefix))
        numbers.append(np.array([(number, *rest) for _, *rest in samples], np.int64))
    table = np.concatenate(numbers)
    return Samples(
        shards=[*map(str, shards)],
        names=Paths.joined(names),
        shard=table[:, 0].astype(np.int32),
        place=np.ascontiguousarray(table[:, 1:3]),
        labels=table[:, 3].astype(np.int32),
    )


class _Member(NamedTuple):
    name: str
    begin: int
    size: int


def _samples(path: Path, keys: Keys) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, place, size and label of every image of a file."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for key, members in _grouped(path, file):
            image = next((members[k] for k in keys.images if k in members), None)
            if image is None:
                continue
            if key in seen:
                raise ConfigError(
                    f"{path}: the sample {key} is there twice: write the tar again with names of "
                    "their own, and the members of a sample one after another"
                )
            seen.add(key)
            if keys.label not in members:
                raise ConfigError(
                    f"{path}: the sample {key} has {', '.join(members)} and no {keys.label}: write "
                    "its label, or name the member that has it in data.label_key"
                )
            yield *image, _label(path, file, members[keys.label])


def _grouped(path: Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Yield the members of every sample by what they are, with the name of the sample."""
    current, members = "", dict[str, _Member]()
    for member in _members(path, file):
        parts = _NAME.fullmatch(member.name)
        if parts is None:
            continue
        key, kind = parts[1], parts[2].lower()
        if key != current:
            if members:
                yield current, members
            current, members = key, {}
        if kind in members:
            raise ConfigError(
                f"{path}: the member {member.name} is there twice: write the tar again"
            )
        members[kind] = member
    if members:
        yield current, members


def _members(path: Path, file: BinaryIO) -> Iterator[_Member]:
    """Yield the files in a tar file.

    Raises:
        ConfigError: it is compressed, damaged or truncated.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                if member.isreg():
                    yield _Member(member.name, member.offset_data, member.size)
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all
            file.seek(tar.offset)
            end = file.read(len(_END))
    except tarfile.TarError as error:
        raise ConfigError(f"{path}: {_damage(path, str(error))}") from None
    if end != _END:
        raise ConfigError(f"{path}: {_damage(path, 'no end where one is expected')}")


def _damage(path: Path, reason: str) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zX":
        return "a compressed tar file, which cannot be read at any place: decompress it"
    return f"no tar file, damaged or truncated ({reason}): write it again, or leave it out"


def _label(path: Path, file: BinaryIO, member: _Member) -> int:
    """Return the number of a class that a member contains as text."""
    file.seek(member.begin)
    text = file.read(min(member.size, _MAX_LABEL + 1))
    try:
        label = int(text.decode("ascii"))
    except ValueError:
        label = -1
    if not 0 <= label < 2**31 or len(text) > _MAX_LABEL:
        raise ConfigError(
            f"{path}: the label {member.name} is {text[:_MAX_LABEL]!r}: expected the number of a "
            "class, from 0 on, as text"
        )
    return label


def expanded(folder: Path, key: str, pattern: str) -> list[Path]:
    """Return the files below a folder that a pattern names, sorted.

    Braces are expanded as in a shell: numbers ({000..019}) and alternatives ({a,b}). Then `*`, `?`
    and `[]` stand for parts of names.

    Raises:
        ConfigError: a file is missing or named twice, or nothing is found.
    """
    if "://" in pattern or pattern.startswith("pipe:") or Path(pattern).is_absolute():
        raise ConfigError(
            f"data.{key}={pattern}: expected names of files below data.root={folder}, such as "
            "train-{000..019}.tar or train-*.tar"
        )
    found: list[Path] = []
    for name in _braces(pattern):
        files = [*folder.glob(name)] if re.search(r"[*?\[]", name) else [folder / name]
        missing = [name] if not files else [str(path) for path in files if not path.is_file()]
        if missing:
            there = sorted(path.name for path in folder.glob("*.tar"))
            raise ConfigError(
                f"data.{key}={pattern}: no file {first(missing)} in {folder}; there are "
                f"{first(there) or 'no tar files'}"
            )
        found += files
    if not found:
        raise ConfigError(f"data.{key}={pattern}: names no file")
    twice = sorted({str(path) for path in found if found.count(path) > 1})
    if twice:
        raise ConfigError(f"data.{key}={pattern}: names {first(twice)} more than once")
    return sorted(found)


def _braces(pattern: str) -> Iterator[str]:
    """Yield what a shell makes of braces.

    >>> [*_braces("{a,b}-{08..10}.tar")][:4]
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar']
    """
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    parts: Sequence[str] = braces[1].split(",")
    if numbers is not None:
        low, high = numbers.groups()
        width = max(map(len, (low, high))) if "0" in (low[0], high[0]) else 0
        parts = [f"{number:0{width}}" for number in range(int(low), int(high) + 1)]
    for part in parts:
        yield from _braces(pattern[: braces.start()] + part + pattern[braces.end() :])
