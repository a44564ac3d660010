"""Listings of many image files, kept in the user's cache folder while no folder changes.

A folder changes when a file in it is added, removed or renamed: the times of all folders that were
read are kept with the listing, and compared before it is used again. A listing of folders that
changed just now is not kept, because times are not exact.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout

from vitrim.data.paths import Paths, are_sound
from vitrim.files import digest, own_folder, write

_log = logging.getLogger(__name__)
T = TypeVar("T")
FORMAT = 1
KEPT_FROM = 10_000
"""Images of a split whose listing is kept: fewer are listed faster than they are looked up."""
_SETTLED_NS = 2 * 10**9
"""Age of a change at which the times of folders say that nothing has changed since."""
_WAIT_S = 900
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile)
"""What reading a damaged file of the cache raises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What is in the folder of a split.

    Args:
        paths: of all images, class after class.
        classes: number of images by the name of the class folder, in order.
        directories: the folders that were read.
        ignored: folders that are no classes.
        others: number of other files by extension, by class folder.
        loose: paths of images outside of class folders.
        differs: whether version 0.1.0 would have listed other images.
    """

    paths: Paths
    classes: Mapping[str, int]
    directories: Sequence[str]
    ignored: Sequence[str]
    others: Mapping[str, Mapping[str, int]]
    loose: Sequence[str]
    differs: bool


def remembered(folder: Path, extensions: Sequence[str], scan: Callable[[], Listing]) -> Listing:
    """Return the listing of a folder: the one that is kept if it still holds, else a new one.

    Of several processes on a machine that begin together, one scans and the others read.

    Args:
        folder: of the split.
        extensions: of the files that are listed, which depend on the machine.
        scan: lists the folder.

    Raises:
        OSError: `scan` cannot read a folder.
    """
    place = cache_folder()
    if place is None:
        return scan()
    key = digest([FORMAT, os.path.realpath(folder), str(folder), *extensions])
    path = place / f"{key}.npz"
    with one_at_a_time(path):
        kept = _read(path, folder)
        if kept is not None:
            return kept
        begun = time.time_ns()
        found = scan()
        if len(found.paths) >= KEPT_FROM:
            _keep(path, found, begun)
        return found


def noted(kind: str, names: Sequence[str], facts: object, find: Callable[[], T]) -> T:
    """Return what was found before of so many names, or find it: plain data of JSON.

    Args:
        kind: what is found.
        names: of images.
        facts: what it depends on apart from the names.
        find: finds it.
    """
    place = cache_folder()
    if place is None or not isinstance(names, Paths) or len(names) < KEPT_FROM:
        return find()
    key = digest([FORMAT, kind, names.prefix, names.checksum(), facts])
    path = place / f"{kind}-{key}.json"
    with suppress(*DAMAGED):
        known: T = json.loads(path.read_text())
        return known
    found = find()
    with suppress(OSError, ValueError):
        own_folder(place)
        write(path, lambda part: part.write_text(json.dumps(found)))
    return found


def cache_folder() -> Path | None:
    """Return the folder of kept listings, which need not exist; None where the user has no home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "vitrim" / "listings"


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one of several processes of a run go on at a time; a lone process goes on at once."""
    lock = None
    if _is_one_of_several():
        with suppress(OSError, Timeout):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire(timeout=_WAIT_S)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _is_one_of_several() -> bool:
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS")
    return any(os.environ.get(name, "1") not in ("", "1") for name in names)


def _keep(path: Path, found: Listing, begun: int) -> None:
    """Write a listing, unless a folder changed shortly before it was read or later."""
    times = _times(found.directories)
    if times.max() > begun - _SETTLED_NS:
        _log.info("%s: changed just now, its listing is not kept", found.directories[0])
        return
    facts = {
        "classes": dict(found.classes),
        "directories": found.directories,
        "ignored": found.ignored,
        "others": found.others,
        "loose": found.loose,
        "differs": found.differs,
        "prefix": found.paths.prefix,
    }
    text = json.dumps(facts).encode()  # names in other encodings are escaped
    arrays = {
        "facts": np.frombuffer(text, np.uint8),
        "times": times,
        "buffer": found.paths.buffer,
        "bounds": found.paths.bounds,
    }
    try:
        own_folder(path.parent)
        write(path, lambda part: save_arrays(part, arrays))
    except (OSError, ValueError) as error:
        _log.info("%s: the listing is not kept (%s)", found.directories[0], error)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a file whose name need not end in npz."""
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path, folder: Path) -> Listing | None:
    """Return the listing that is kept, or None: there is none, it is damaged, or it is outdated."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            if not np.array_equal(arrays["times"], _times(facts["directories"])):
                _log.info("%s: has changed, listed again", folder)
                return None
            prefix = facts.pop("prefix")
            paths = Paths(prefix, arrays["buffer"], arrays["bounds"])
        found = Listing(paths=paths, **facts)
        sound = (
            prefix == f"{folder}{os.sep}"
            and are_sound(paths)
            and sum(found.classes.values()) == len(paths)
        )
        return found if sound else None
    except DAMAGED as error:
        _log.info("%s: not a listing, listed again (%s)", path, error)
        return None


def _times(directories: Sequence[str]) -> np.ndarray:
    """Return when each folder, and its entry in the file system, last changed, (n, 2), in ns."""
    states = map(os.stat, directories)
    return np.array([(state.st_mtime_ns, state.st_ctime_ns) for state in states], np.int64)
