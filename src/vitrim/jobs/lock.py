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
_WAITING, _HELD = 0, -1


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is created if missing; wait while another run holds it.

    Of several processes of one run, the main process holds it, and the others wait with it.

    Raises:
        Preempted: the main process was asked to stop while it waited; in every process.
    """
    main = distributed.is_main_process()
    file_lock = _lock_of(folder) if main else None
    while True:
        state = distributed.broadcast(_try(file_lock))  # one message a second: no call is long
        if state == _HELD:
            break
        if state != _WAITING:
            raise signals.Preempted(state)
        if main:
            _log.info("%s: waiting for another run in this folder", folder)
    try:
        yield
    finally:
        if file_lock is not None:
            file_lock.release()


def _lock_of(folder: Path) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / LOCK)


def _try(file_lock: FileLock | None) -> int | None:
    """Try for a second to get the lock; return the state, or the signal that asked to stop.

    None in the processes that do not decide.
    """
    if file_lock is None:
        return None
    try:
        file_lock.acquire(timeout=1)
    except Timeout:
        return signals.received() or _WAITING
    return _HELD
