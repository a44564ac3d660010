"""Runs that version 0.1.0 finished are found again by the same command."""

import shutil
from pathlib import Path

import pytest

from command import Command

EARLIER = Path(__file__).parent / "earlier"
"""Folders that 0.1.0 wrote: `vitrim data=none method=METHOD strength=2 latency.repeats=1`."""


@pytest.mark.parametrize("method", sorted(path.name.split("-")[2] for path in EARLIER.iterdir()))
def test_a_run_of_an_earlier_version_is_found(command: Command, method: str) -> None:
    shutil.copytree(EARLIER, command.out)
    (report,) = command.out.glob(f"*-{method}-*/*/report.json")
    before = report.read_bytes()
    done = command("data=none", f"method={method}", "strength=2", "latency.repeats=1")
    assert done.code == 0
    assert done.report == report
    assert report.read_bytes() == before


def test_a_changed_recipe_does_not_take_the_earlier_run(command: Command) -> None:
    shutil.copytree(EARLIER, command.out)
    done = command("data=none", "method=vtp", "strength=2", "latency.repeats=1", "method.l1=0.5")
    assert done.code == 0
    assert not any(done.report.parent.name == path.name for path in EARLIER.glob("*/*"))
