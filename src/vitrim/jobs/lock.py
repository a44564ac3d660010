"""The lock of a folder: one run at a time works in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vitrim.jobs import distributed, signals

_log = logging.getLogger(__name__)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, made if missing: one run at a time works in it.

    Of several processes of one run the first holds it.
    """
    if not distributed.first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    while True:
        try:
            held.acquire(timeout=1)
            break
        except Timeout:
            _log.info("%s: waiting for another run there", folder)
            signals.check()
    try:
        yield
    finally:
        held.release()
