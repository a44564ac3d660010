"""Requests to stop: noted when a signal comes, acted on where nothing is lost.

Handlers only set a flag. Training checks it after every batch, saves, and raises `Preempted`; the
process then exits with 143 (SIGTERM, SIGINT) or 75 (SIGUSR1, SIGUSR2: to be restarted), never with
0. This module imports nothing heavy, so that the handlers are installed before the slow imports.
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
"""Environment variable with the id of the parent process; without that parent, this one stops."""

_received: list[int] = []


class Preempted(VitrimError):
    """A run that was asked to stop and has saved its state; the same command resumes it."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after saving; run the same command to resume")
        self.code = CODES[signal.Signals(signum)]


def install() -> None:
    """Handle the four signals, in place of Lightning's handlers; only in the main thread.

    A second SIGINT interrupts at once, as in Python.
    """
    if threading.current_thread() is threading.main_thread():
        for signum in CODES:
            signal.signal(signum, _note)


def _note(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGINT and signum in _received:
        raise KeyboardInterrupt
    _received.append(signum)


def received() -> int | None:
    """Return the first signal that came; a parent that no longer exists counts as SIGTERM."""
    parent = os.environ.get(PARENT)
    if not _received and parent is not None and parent != str(os.getppid()):
        _received.append(signal.SIGTERM)
    return _received[0] if _received else None


def raise_if_stopped() -> None:
    """Raise Preempted if the process was asked to stop."""
    signum = received()
    if signum is not None:
        raise Preempted(signum)


@contextmanager
def handled() -> Iterator[None]:
    """Note the four signals; at the end forget them and restore the earlier handlers."""
    earlier = {signum: signal.getsignal(signum) for signum in CODES}
    install()
    try:
        yield
    finally:
        _received.clear()
        if threading.current_thread() is threading.main_thread():
            for signum, handler in earlier.items():
                signal.signal(signum, handler)
