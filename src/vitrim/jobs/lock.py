"""The lock of a folder: one run at a time works in it."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, Timeout

from vitrim.jobs import distributed, signals
from vitrim.jobs.status import LOCK

_log = logging.getLogger(__name__)
_WAITING, _HELD, _TOO_LONG = 0, -1, -2
_wait_minutes: ContextVar[float | None] = ContextVar("wait_minutes", default=None)


class WaitedTooLong(signals.Preempted):
    """A run that gives its node back instead of waiting for another run any longer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(signal.SIGUSR2)
        minutes = _wait_minutes.get() or 0.0
        self.args = (
            f"another run has worked in {folder} for {minutes:g} minutes (sweep.wait_minutes): "
            "this one ends, to go on when it is started again",
        )


@contextmanager
def limited_wait(minutes: float | None) -> Iterator[None]:
    """Let `lock` raise WaitedTooLong after so many minutes; None: never."""
    token = _wait_minutes.set(minutes)
    try:
        yield
    finally:
        _wait_minutes.reset(token)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is created if missing; wait while another run holds it.

    Of several processes of one run, the main process holds it, and the others wait with it.

    Raises:
        WaitedTooLong: another run holds it longer than `limited_wait` allows; in every process.
        Preempted: the main process was asked to stop while it waited; in every process.
    """
    main = distributed.is_main_process()
    file_lock = _lock_of(folder) if main else None
    limit = _wait_minutes.get()
    deadline = None if limit is None else time.monotonic() + 60 * limit
    while True:
        # one message a second: no call is long
        state = distributed.broadcast(_try(file_lock, deadline))
        if state == _HELD:
            break
        if state == _TOO_LONG:
            raise WaitedTooLong(folder)
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


def _try(file_lock: FileLock | None, deadline: float | None) -> int | None:
    """Try for a second to get the lock; return the state, or the signal that asked to stop.

    None in the processes that do not decide.
    """
    if file_lock is None:
        return None
    try:
        file_lock.acquire(timeout=1)
    except Timeout:
        late = deadline is not None and time.monotonic() > deadline
        return signals.received() or (_TOO_LONG if late else _WAITING)
    return _HELD
