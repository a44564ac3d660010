"""A small part of `make faults`: what runs go through leaves nothing lost, different or silent."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from fresh import python

SLOW = (
    "kill -9 anywhere",
    *("kill -9 of few images", "kill -9 in a sweep", "kill -9 of one of two"),
    *("a sweep", "cut against masked", "requests to stop", "full disk"),
)
ROWS = ("kill -9 while saving", "damaged files")


@pytest.mark.parametrize("rows", [ROWS, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_nothing_is_lost(rows: Sequence[str]) -> None:
    done = python(
        *("-m", "tests.faults", "--kills", "2", "--share", "0.02", "--damages", "200"),
        *("--cases", "100", "--only", ",".join(rows)),
        cwd=Path(__file__).parents[1],
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for row in rows:
        not_root = f"{row:22} not run: mounting a small disk needs root"
        assert f"{row:22} ok" in done.stdout or not_root in done.stdout
