"""Runs that version 0.1.0 finished are found again by the same command."""

import shutil
from pathlib import Path

import pytest

from command import Command, Done
from vitrim.method.dcvit.method import DCViT

EARLIER = Path(__file__).parent / "earlier"
"""Folders that 0.1.0 wrote: `vitrim data=none method=METHOD strength=2 latency.repeats=1`."""
FORMER = {
    "practise": (
        "method.recoverability=least_squares",
        "method.protected=[0,0]",
        "method.pooled_weight=0.0",
    ),
    "mir": ("method.protected=[0,0]",),
}
"""What 0.1.0 did by default, where the default is another now."""


def of_earlier(command: Command, method: str, *words: str) -> Done:
    return command("data=none", f"method={method}", "strength=2", "latency.repeats=1", *words)


@pytest.mark.parametrize("method", sorted(path.name.split("-")[2] for path in EARLIER.iterdir()))
def test_a_run_of_an_earlier_version_is_found(command: Command, method: str) -> None:
    shutil.copytree(EARLIER, command.out)
    (report,) = command.out.glob(f"*-{method}-*/*/report.json")
    before = report.read_bytes()
    done = of_earlier(command, method, *FORMER.get(method, ()))
    assert done.code == 0
    assert done.report == report
    assert report.read_bytes() == before


@pytest.mark.parametrize("method", FORMER)
def test_a_default_that_gives_another_result_does_not_find_the_earlier_run(
    command: Command, method: str
) -> None:
    shutil.copytree(EARLIER, command.out)
    done = of_earlier(command, method)
    assert done.code == 0
    assert not (EARLIER / done.report.parent.parent.name).is_dir()


def test_a_changed_recipe_does_not_take_the_earlier_run(command: Command) -> None:
    shutil.copytree(EARLIER, command.out)
    done = command("data=none", "method=vtp", "strength=2", "latency.repeats=1", "method.l1=0.5")
    assert done.code == 0
    assert not any(done.report.parent.name == path.name for path in EARLIER.glob("*/*"))


def test_a_method_whose_results_changed_does_not_take_the_earlier_run(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(EARLIER, command.out)
    monkeypatch.setattr(DCViT, "revision", 2)
    done = command("data=none", "method=dcvit", "strength=2", "latency.repeats=1")
    assert done.code == 0
    assert not any(done.report.parent.name == path.name for path in EARLIER.glob("*/*"))
