"""Jobs as forks of one process that has imported torch and the libraries around it.

An import takes seconds; a fork takes none. The process is the server of multiprocessing's start
method "forkserver": it does nothing but import and fork, so that a job has no state of another.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

from vitrim.jobs.signals import PARENT

_IMPORTED = ("lightning", "timm", "torchmetrics.classification", "vitrim.cli.app")
_lock = threading.Lock()
"""multiprocessing looks at all its processes whenever one starts, in whichever thread."""


def possible() -> bool:
    """Whether this process is the command `vitrim`: a fork imports its main module again."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return (spec.name if spec else Path(file or "").name) in ("vitrim.__main__", "vitrim")


class Forked:
    """A job, with the methods of `subprocess.Popen` that a sweep uses.

    Args:
        arguments: the command line of the job.
        environment: all its variables.
    """

    returncode: int

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        with _lock:
            self._process = _server().Process(target=_run, args=([*arguments], {**environment}))
            self._process.start()

    def poll(self) -> int | None:
        """Return the exit code, that of a signal negative; None while the job runs."""
        with _lock:
            code = self._process.exitcode
        if code is not None:
            self.returncode = code
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the job has ended."""
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill the job, unless it has ended."""
        with _lock:
            self._process.kill()


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    return context


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Be `python -m vitrim` with `arguments`, as a process that the server has forked."""
    gc.freeze()  # what the server has imported is no garbage
    os.setsid()  # Ctrl-C reaches the sweep, which passes it on once
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop(PARENT, None)  # the server; the sweep is watched instead
    threading.Thread(target=_stop_without_sweep, daemon=True).start()
    sys.argv[1:] = arguments
    runpy.run_module("vitrim", run_name="__main__", alter_sys=True)


def _stop_without_sweep() -> None:
    """Ask this job to stop when the process of the sweep has ended."""
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os.kill(os.getpid(), signal.SIGTERM)
