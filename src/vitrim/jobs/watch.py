"""An eye on the other processes of a run: one that ends must not leave the others waiting.

A message that does not come ends a process that waits for it by gloo at once, but one that waits
on a GPU (NCCL), or that computes, only after hours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vitrim.jobs import signals

GRACE_S = 30.0
"""Seconds in which a process may notice by itself that another one has ended."""
_EVERY_S = 1.0


@contextmanager
def watched(
    children: Sequence[subprocess.Popen[bytes]], reason: Callable[[], str]
) -> Iterator[None]:
    """End this process `GRACE_S` seconds after a child failed, or its parent ended.

    Args:
        children: the processes that this one started.
        reason: says what became of them, for the user.
    """
    parent = os.environ.get(signals.PARENT)
    if not children and parent is None:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(children, reason, parent, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(
    children: Sequence[subprocess.Popen[bytes]],
    reason: Callable[[], str],
    parent: str | None,
    over: threading.Event,
) -> None:
    """Look at the other processes every second, until the work is over."""
    while not over.wait(_EVERY_S):
        failed = any(child.poll() for child in children)
        orphaned = parent is not None and parent != str(os.getppid())
        if (failed or orphaned) and not over.wait(GRACE_S):
            if failed:
                sys.stderr.write(f"vitrim: {reason()}\n")
                sys.stderr.flush()
            for child in children:
                if child.poll() is None:
                    child.kill()
            os._exit(1)
