"""Adaptors in two processes: each trains its share, and both end with the scores of one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from test_end_to_end import STEPS, training

from jobs.test_distributed import in_two_processes
from nets import small_net
from phase_runner import DIGITS, At, runner, stop
from vitrim.jobs import signals
from vitrim.jobs.distributed import process_group
from vitrim.method.practise.end_to_end import EndToEnd
from vitrim.plan import Evidence

TWO = {"devices": 2, "strategy": "ddp"}
SCRIPT = """
import sys
sys.path.append({here!r})
import test_end_to_end_shared as tests
tests.all_cases({folder!r})
"""


def scored(
    folder: Path, blocks: int, *callbacks: Callback, repeats: int = 0, **options: object
) -> EndToEnd:
    """Score some blocks: two epochs of 5 batches, and one of measuring."""
    phase = EndToEnd(
        small_net(dtype=torch.float32, depth=4, **DIGITS),
        groups=[(f"blocks.{number}",) for number in range(blocks)],
        images=8 * STEPS,
        training=training(8),
        latency_repeats=repeats,
    )
    run = runner(folder, minutes=0.0, batch_size=8)
    run = replace(run, trainer=partial(run.trainer, **options))
    run.run_or_load(folder / "x", phase, name="x", callbacks=callbacks)
    return phase


def stopped(folder: Path, at: int, action: Callable[[], None]) -> None:
    """Stop the scoring of three blocks in a step, counted from 1."""
    with pytest.raises(signals.Preempted), signals.handled():
        scored(folder, 3, At(at, action), **TWO)


def all_cases(folder: str) -> None:
    """Score blocks in one of two processes, and save scores and the number of candidates."""
    place, rank = Path(folder), int(os.environ["RANK"])
    found: dict[str, object] = {}
    built: list[int] = []

    class Counted(EndToEnd):
        def _build(self) -> list[Any]:
            candidates = super()._build()
            built.append(len(candidates))
            return candidates

    with pytest.MonkeyPatch.context() as patch, process_group({"accelerator": "cpu", **TWO}):
        patch.setattr("test_end_to_end_shared.EndToEnd", Counted)
        for blocks in (1, 3):
            found[f"{blocks}"] = scored(place / f"{blocks}", blocks, **TWO).scores
        found["built"] = list(built)
        found["savings"] = evidence_of(scored(place / "savings", 3, repeats=3, **TWO))
        action = stop() if rank else (lambda: None)
        stopped(place / "stopped", 2, action)
        stopped(place / "stopped", 2 * STEPS + 2, action)  # while errors are measured
        found["resumed"] = scored(place / "stopped", 3, **TWO).scores
    torch.save(found, place / f"found{rank}.pt")


def evidence_of(phase: EndToEnd) -> dict[str, dict[str, float]]:
    evidence: Evidence = phase.evidence()
    return {"scores": dict(evidence.block_scores), "savings": dict(evidence.block_savings)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two processes found."""
    folder = tmp_path_factory.mktemp("shared")
    script = SCRIPT.format(here=str(Path(__file__).parent), folder=str(folder))
    in_two_processes(script, timeout=120)
    return [torch.load(folder / f"found{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("blocks", [1, 3])
def test_two_processes_find_what_one_does(
    blocks: int, shared: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = scored(tmp_path, blocks).scores
    assert alone.shape == (blocks,)
    assert all(torch.equal(found[f"{blocks}"], alone) for found in shared)


def test_each_trains_its_share_alone(shared: list[dict[str, Any]]) -> None:
    assert [found["built"] for found in shared] == [[1, 2], [1]]


def test_savings_are_those_of_the_main_process(shared: list[dict[str, Any]]) -> None:
    first, second = (found["savings"] for found in shared)
    assert len(first["savings"]) == 3
    assert first == second


def test_stopped_anywhere_both_go_on_with_their_own(shared: list[dict[str, Any]]) -> None:
    assert all(torch.equal(found["resumed"], found["3"]) for found in shared)
