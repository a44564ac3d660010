"""Requests to stop: noted when they come, acted on where nothing is lost.

Handlers only set a flag. Training looks at it after every batch, saves, and raises `Preempted`; the
process then ends with 143 (SIGTERM, SIGINT) or 75 (SIGUSR1, SIGUSR2: to be started again), never
with 0. Nothing heavy is imported here, so that the handlers stand before the imports begin.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vitrim.errors import VitrimError

CODES = {signal.SIGTERM: 143, signal.SIGINT: 143, signal.SIGUSR1: 75, signal.SIGUSR2: 75}
"""Exit code by signal: 128 + 15, and EX_TEMPFAIL."""

PARENT = "VITRIM_PARENT"
"""Environment variable: the process without which this one shall not go on."""

_noted: list[int] = []


class Preempted(VitrimError):
    """A run that was told to stop and has saved what it had; the same command goes on."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; the same command goes on from here")
        self.code = CODES[signal.Signals(signum)]


def install() -> None:
    """Take over the four signals, from Lightning too; elsewhere than in the main thread do nothing.

    A second SIGINT interrupts at once, as Python does.
    """
    if threading.current_thread() is threading.main_thread():
        for signum in CODES:
            signal.signal(signum, _note)


def _note(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGINT and signum in _noted:
        raise KeyboardInterrupt
    _noted.append(signum)


def noted() -> int | None:
    """Return the first signal that came; a parent that is gone counts as SIGTERM."""
    parent = os.environ.get(PARENT)
    if not _noted and parent is not None and parent != str(os.getppid()):
        _noted.append(signal.SIGTERM)
    return _noted[0] if _noted else None


def check() -> None:
    """Raise Preempted if the process was told to stop."""
    signum = noted()
    if signum is not None:
        raise Preempted(signum)


@contextmanager
def taken() -> Iterator[None]:
    """Note the four signals; afterwards forget them, and do with them as before."""
    before = {signum: signal.getsignal(signum) for signum in CODES}
    install()
    try:
        yield
    finally:
        _noted.clear()
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)
