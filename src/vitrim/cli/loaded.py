"""Configuration files of vitrim's own and of Hydra, parsed once in a process.

Hydra parses them again in every composition, and the jobs of a sweep or the calls of a notebook
compose often. Those files are not a user's: they stay as they are while a process runs. Files of
others are read each time.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

from hydra.plugins.config_source import ConfigSource

from vitrim.cli import config_files

T = TypeVar("T")
_kept: dict[Hashable, bytes] = {}
"""What was loaded, as pickles: OmegaConf's nodes come out of one faster than out of a deep copy."""


def once(key: Hashable | None, load: Callable[[], T]) -> T:
    """Return what `load` gives, of its own at each call, and call it only once for each `key`.

    Args:
        key: what decides on the result; None: call `load` in any case.
        load: gives objects that can be pickled.
    """
    if key is None:
        return load()
    if key in _kept:
        copy: T = pickle.loads(_kept[key])  # made below, in this process
        return copy
    result = load()
    _kept[key] = pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
    return result


def version(source: ConfigSource | None, config_path: str) -> Hashable | None:
    """Return what identifies the content of a file in `source`; None for files of others."""
    if source is None:
        return None
    place = (config_path, source.provider, source.path)
    if source.scheme() == "pkg" and source.path == "hydra.conf":
        return place
    file = Path(source.path, source._normalize_file_name(config_path))
    if source.scheme() == "file" and config_files.is_own(file):
        stat = file.stat()
        return *place, stat.st_mtime_ns, stat.st_size
    return None
