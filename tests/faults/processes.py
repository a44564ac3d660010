"""Sweeps and two-process runs of which one process is killed; the command again has to end them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.faults.runs import QUICK, contents, more

_SHORT = (
    *(word for word in QUICK if "epochs" not in word),
    *("model.training.epochs=2", "method.gating.epochs=1", "method.fine_tuning.epochs=2"),
)
SWEEP = ("-m", *_SHORT, "seed=0,1")
TWO = (*_SHORT, "seed=0", "trainer.devices=2", "trainer.strategy=ddp")
_PATIENCE = 120.0  # seconds in which the others have to end


def sweeps(n: int, work: Path, seed: int) -> dict[str, int]:
    """Kill sweeps, alone or with the job that runs; what was done must not be done again."""
    return _killed(n, work, seed, "interrupted-sweep", SWEEP)


def ranks(n: int, work: Path, seed: int) -> dict[str, int]:
    """Kill one of two processes of a run; the other has to end by itself."""
    return _killed(n, work, seed, "two", TWO)


def _killed(n: int, work: Path, seed: int, name: str, words: Sequence[str]) -> dict[str, int]:
    generator, begun = random.Random(seed), time.monotonic()
    found = Counter(runs=0, kills=0, lost=0, different=0, repeated=0, hung=0)
    whole = work / f"whole-{name}"
    _attempt(words, whole, None, generator, found)
    seconds = time.monotonic() - begun
    while more(found["kills"], n, begun):
        out = work / f"{name}-{found['runs']}"
        code, tries = 1, 0
        while code != 0 and tries < 20:
            stop = more(found["kills"], n, begun)
            after = generator.uniform(0.3, 1 + tries / 5) * seconds if stop else None
            done = {path: path.stat().st_mtime_ns for path in out.glob("*/*/report.json")}
            code = _attempt(words, out, after, generator, found)
            found["repeated"] += any(path.stat().st_mtime_ns != at for path, at in done.items())
            tries += 1
        found["runs"] += 1
        found["lost"] += code != 0
        found["different"] += not contents(whole) or contents(out) != contents(whole)
        shutil.rmtree(out, ignore_errors=True)
    return dict(found)


def _attempt(
    words: Sequence[str],
    out: Path,
    after: float | None,
    generator: random.Random,
    found: Counter[str],
) -> int:
    """Run the command, of which one process is killed after so many seconds; return its code."""
    first = subprocess.Popen(
        [sys.executable, "-m", "vitrim", *words, f"out={out}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return first.wait(timeout=after)
    except subprocess.TimeoutExpired:
        processes = [first.pid, *_children(first.pid)]
    os.kill(generator.choice(processes), signal.SIGKILL)
    found["kills"] += 1
    _wait(first, processes, found)
    return first.returncode


def _wait(first: subprocess.Popen[bytes], processes: Sequence[int], found: Counter[str]) -> None:
    """Wait until all have ended; end those that do not."""
    deadline = time.monotonic() + _PATIENCE
    while first.poll() is None or any(map(_is_alive, processes[1:])):
        if time.monotonic() > deadline:
            found["hung"] += 1
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            first.wait()
            return
        time.sleep(0.05)


def _children(process: int) -> list[int]:
    """Return the processes that `process` started and that run."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in listed.split()]


def _is_alive(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
