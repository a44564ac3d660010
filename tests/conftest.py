"""How tests run: which are slow, what a process of tests is like, and the command as a fixture."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings

if TYPE_CHECKING:
    from command import Command

collect_ignore = ["faults/inject"]
gc.disable()  # until everything is imported: 14 % of the time that torch and lightning take
settings.register_profile(
    "vitrim",
    derandomize=True,
    deadline=None,
    max_examples=6,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining takes minutes
    suppress_health_check=[HealthCheck.too_slow],  # slow on a busy machine only
)
settings.register_profile("nightly", settings.get_profile("vitrim"), max_examples=100)
settings.load_profile("vitrim")
SLOW = tuple(
    line
    for line in Path(__file__).with_name("slow.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def pytest_configure(config: pytest.Config) -> None:
    """Set up a process that runs tests; one that only hands them out to others imports no torch."""
    if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
        gc.enable()
        return
    import torch
    from lightning.fabric.utilities import registry

    with suppress(
        ImportError
    ):  # OpenVINO brings it; it would close the file that pytest captures in
        from absl.logging import PythonHandler

        PythonHandler.close = logging.StreamHandler.close
    torch.set_num_threads(1)  # networks this small are slower on two
    registry.entry_points = cache(metadata.entry_points)  # each Trainer reads those of all packages


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow.txt."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave the million objects of the imported libraries to no further garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # a run makes and leaves 100,000s: a sixth of its time
    gc.enable()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what gives the folder of a finished run, made once; tests must not change it."""
    from command import folder_of

    out = tmp_path_factory.mktemp("finished")
    return cache(lambda *arguments: folder_of(f"out={out}", *arguments))


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Return the command `vitrim` with run folders of its own."""
    from command import Command  # here, because it imports all of vitrim

    return Command(tmp_path / "outputs", monkeypatch, capsys)
