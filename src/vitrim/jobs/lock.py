"""The lock of a folder: one run at a time works in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vitrim.jobs import distributed, signals
from vitrim.jobs.status import LOCK

_log = logging.getLogger(__name__)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is created if missing; wait while another run holds it.

    Of several processes of one run, the main process holds it.
    """
    if not distributed.is_main_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(folder / LOCK)
    while True:
        try:
            file_lock.acquire(timeout=1)
            break
        except Timeout:
            _log.info("%s: waiting for another run in this folder", folder)
            signals.raise_if_stopped()
    try:
        yield
    finally:
        file_lock.release()
