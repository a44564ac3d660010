"""A process that does not notice that another one of its run has ended is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from vitrim.jobs import signals

WORK = """
import subprocess, sys, time
from vitrim.jobs import watch

watch.GRACE_S, watch._EVERY_S = 0.2, 0.1
child = [subprocess.Popen(["sleep", "60"])] if "child" in sys.argv else []
print(child[0].pid if child else 0, flush=True)
with watch.watched(child, lambda: "process 1 of 2 ended"):
    time.sleep(60)
"""


def started(*words: str, parent: int) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, *words],
        env={**os.environ, signals.PARENT: str(parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_the_death_of_a_child_ends_a_process_that_computes() -> None:
    process, child = started("child", parent=os.getpid())
    os.kill(child, signal.SIGKILL)
    _, message = process.communicate(timeout=30)
    assert (process.returncode, message) == (1, "vitrim: process 1 of 2 ended\n")


def test_the_death_of_the_parent_ends_its_child() -> None:
    process, _ = started(parent=1 if os.getpid() != 1 else 2)
    _, message = process.communicate(timeout=30)
    assert (process.returncode, message) == (1, "")


@pytest.mark.parametrize("words", [(), ("child",)])
def test_work_among_living_processes_goes_on(words: tuple[str, ...]) -> None:
    process, child = started(*words, parent=os.getpid())
    try:
        time.sleep(0.5)
        assert process.poll() is None
    finally:
        process.kill()
        if child:
            os.kill(child, signal.SIGKILL)
        process.communicate()
