"""Runs that begin with the compact network of another run: one budget, one plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import vitrim
from command import QUICK, Command
from vitrim.plan import Keep, LowRank

FEW = (*QUICK, "method.sampling.images=128")
LOW_RANK = ("method=mixed_rank", "target.params=0.6", *FEW)


Finished = Callable[..., Path]


@pytest.fixture
def sliced(finished: Finished) -> Path:
    return finished("method=oneshot", "target.params=0.8", *FEW)


@pytest.fixture
def unseen(finished: Finished) -> Path:
    return finished("method=oneshot", "data=none", "target.params=0.8", "latency.repeats=1")


def test_a_sliced_network_is_factorised_within_a_joint_budget(
    command: Command, sliced: Path
) -> None:
    done = command(*LOW_RANK, f"from_run={sliced}")
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    assert 0.59 < report["kept"]["params"] <= 0.6
    net, plan = vitrim.load(done.report.parent)
    assert {type(edit) for edit in plan.edits} == {Keep, LowRank}
    assert [step["method"] for step in plan.provenance["steps"]] == ["oneshot", "mixed_rank"]
    assert sum(p.numel() for p in net.parameters()) == report["compact"]["params"]
    assert report["stages"].keys() == {"cut", "regress"}


@pytest.mark.parametrize("trained", [0, 1])
def test_dense_compression_goes_on_from_itself(command: Command, trained: int) -> None:
    words = ("method=dcvit", *FEW, "method.tuning.training.epochs=1")
    first = command(*words, "target.blocks=0.9", "method.allowed_blocks=[blocks.1]")
    trials = f"method.trial.training.epochs={trained}"
    done = command(*words, "target.macs=0.6", trials, f"from_run={first.report.parent}")
    assert done.code == 0, done.message
    _, plan = vitrim.load(done.report.parent)
    assert {edit.branch for edit in plan.drops()} == {"blocks.1.attn", "blocks.2.attn"}
    assert "mimic" in json.loads(done.report.read_text())["stages"]


def test_the_start_matters_and_its_folder_does_not(
    command: Command, sliced: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(sliced, tmp_path / "elsewhere")
    names = {
        command(*LOW_RANK, *begin).report.parent.name
        for begin in ((f"from_run={sliced}",), (f"from_run={elsewhere}",), ())
    }
    assert len(names) == 2


def test_without_images_the_structure_alone_is_made(command: Command, unseen: Path) -> None:
    done = command("method=mixed_rank", "target.params=0.6", "data=none", f"from_run={unseen}")
    assert done.code == 0, done.message
    assert json.loads(done.report.read_text())["kept"]["params"] <= 0.6


def test_strength_zero_keeps_what_it_begins_with(command: Command, unseen: Path) -> None:
    done = command("method=vtp", "strength=0", "data=none", f"from_run={unseen}")
    assert vitrim.load(done.report.parent)[1].edits == vitrim.load(unseen)[1].edits


@pytest.mark.parametrize(
    "arguments",
    [
        ("method=oneshot", "method.sites=[mlp]"),
        ("method=oneshot", "method.sites=[qk]"),
        ("method=oneshot", "method.sites=[heads,v]"),
        ("method=dcvit",),
        ("method=dcvit", "method.accounting=paper"),
    ],
)
def test_units_of_layers_in_two_factors_are_not_ranked(
    command: Command, finished: Finished, unseen: Path, arguments: tuple[str, ...]
) -> None:
    low = finished("method=mixed_rank", "target.params=0.6", "data=none", f"from_run={unseen}")
    done = command(*arguments, "target.macs=0.4", "data=none", f"from_run={low}")
    assert done.code == 1
    assert "two factors" in done.message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["from_run=/nonexistent"], ["from_run=/nonexistent", "report.json"]),
        (["from_run={run}", "model=vit_tiny", "data=none"], ["from_run=", "the same model"]),
        (["from_run={run}", "target.params=0.9"], ["target.params=0.9", "a smaller target"]),
    ],
)
def test_what_cannot_be_begun_with_is_refused(
    command: Command, unseen: Path, arguments: list[str], expected: list[str]
) -> None:
    said = [argument.format(run=unseen) for argument in arguments]
    done = command("method=mixed_rank", *said)
    assert done.code == 1
    assert all(word in done.message for word in expected), done.message
