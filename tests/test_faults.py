"""A small part of `make faults`: what runs go through leaves nothing lost, different or silent."""

import subprocess
import sys
from pathlib import Path

import pytest

ROWS = (
    "kill -9 anywhere",
    "kill -9 while saving",
    "requests to stop",
    "full disk",
    "damaged files",
    "a sweep",
)


@pytest.mark.parametrize("row", ROWS)
def test_nothing_is_lost(row: str) -> None:
    command = [sys.executable, "-m", "tests.faults", "--kills", "2", "--share", "0.02"]
    done = subprocess.run(
        [*command, "--only", row],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[1],
    )
    if "not run" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{row:22} ok" in done.stdout
