"""Jobs of a sweep that are forks: what they compute, and how they end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fresh
from command import QUICK, folder_of
from vitrim.files import WEIGHTS, sha256
from vitrim.jobs import forked
from vitrim.jobs.status import read_status

SWEEP = ("-m", "vitrim", "-m", "method=oneshot", "strength=1,2", "sweep.jobs=2", *QUICK)


def test_a_program_of_others_forks_nothing() -> None:
    assert not forked.possible()


@contextmanager
def sweep_without_end(out: Path) -> Iterator[fresh.Popen]:
    """Start a sweep whose dense network is trained for hours, and wait until it is."""
    words = (*SWEEP, "model.training.epochs=5000", f"out={out}")
    process = fresh.Popen([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not any(file.stat().st_size for file in out.glob("*/*/metrics.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield process
    finally:
        process.kill()


@pytest.mark.slow
def test_a_fork_computes_what_a_command_computes(tmp_path: Path) -> None:
    done = fresh.python(*SWEEP, f"out={tmp_path / 'forks'}", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "2 jobs, 2 at a time, as forks" in done.stdout + done.stderr
    alone = folder_of("method=oneshot", "strength=2", *QUICK, f"out={tmp_path / 'alone'}")
    (fork,) = (tmp_path / "forks").glob("*/s2-*")
    assert sha256(fork / WEIGHTS) == sha256(alone / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_or_killed_stops_its_forks(
    tmp_path: Path, number: signal.Signals
) -> None:
    with sweep_without_end(tmp_path) as process:
        process.send_signal(number)
        code = process.wait(60)
        assert code == (-number if number == signal.SIGKILL else 143)
        deadline = time.monotonic() + 60
        while any(status(file) == "RUNNING" for file in tmp_path.glob("*/*/status.json")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert {status(file) for file in tmp_path.glob("*/*/status.json")} == {"PREEMPTED"}


def status(file: Path) -> object:
    return read_status(file).get("status")
