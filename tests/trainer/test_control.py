"""The control: the dense network, trained for as long as the compact one, once for a sweep."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from command import QUICK, Command
from nets import small_net
from phase_runner import DIGITS, At, runner, stop
from refusals import assert_refused
from vitrim.files import read_yaml
from vitrim.jobs import signals
from vitrim.trainer import phases
from vitrim.trainer.control import control_entry
from vitrim.trainer.recipe import Recipe

RECIPE = Recipe(epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=1.0)
RECIPES = (RECIPE, replace(RECIPE, lr=2e-3))
SHORT = ("method.gating.epochs=1", "method.fine_tuning.epochs=1", *QUICK)


def dense() -> nn.Module:
    return small_net(dtype=torch.float32, **DIGITS)


def entry(folder: Path, *recipes: Recipe, net: nn.Module | None = None) -> dict[str, object]:
    net = dense() if net is None else net
    return control_entry(runner(folder), net, recipes, "k")


def test_it_is_trained_by_all_recipes_and_the_network_is_left_alone(tmp_path: Path) -> None:
    net = dense()
    before = copy.deepcopy(net.state_dict())
    both = entry(tmp_path, *RECIPES, net=net)["control"]
    assert isinstance(both, dict)
    assert both["epochs"] == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    folders = sorted(tmp_path.glob("control-*"))
    assert len(folders) == 2
    assert sum((folder / "accuracy.json").is_file() for folder in folders) == 1
    assert entry(tmp_path) == {}
    assert control_entry(None, net, RECIPES, "k") == {}


def test_it_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = entry(tmp_path, *RECIPES)
    monkeypatch.setattr(phases.PhaseRunner, "accuracy", None)  # must not be called again
    assert entry(tmp_path, *RECIPES) == first
    assert len([*tmp_path.glob("control-*")]) == 2


def test_stopped_in_both_trainings_it_ends_the_same(tmp_path: Path) -> None:
    expected = entry(tmp_path / "whole", *RECIPES)
    plain = runner(tmp_path / "stopped")
    assert isinstance(plain.trainer, partial)
    stopped = replace(plain, trainer=partial(plain.trainer, callbacks=[At(3, stop())]))
    for _ in RECIPES:
        with pytest.raises(signals.Preempted), signals.handled():
            control_entry(stopped, dense(), RECIPES, "k")
    assert entry(tmp_path / "stopped", *RECIPES) == expected
    states = [
        {path.parent.name: path.read_bytes() for path in (tmp_path / name).rglob("state.*")}
        for name in ("whole", "stopped")
    ]
    assert len(states[0]) == 2
    assert states[0] == states[1]


def test_a_run_reports_it_and_strengths_share_it(command: Command) -> None:
    words = (*SHORT, "control=true", "model.args.depth=2", "trainer.limit_val_batches=1.0")
    reports = []
    for strength in (0, 3):
        done = command(*words, f"strength={strength}")
        assert done.code == 0, done.message
        reports.append(json.loads(done.report.read_text()))
    assert reports[0]["control"] == reports[1]["control"]
    assert reports[0]["control"]["epochs"] == 2
    assert len([*(command.out / "phases").glob("control-*")]) == 2
    assert len([*(command.out / "phases").glob("dense-*")]) == 1
    assert read_yaml(done.report.parent / "recipe.yaml")["control"] is True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["control=maybe"], ["control=maybe", "true or false"]),
        (["control=true", "method=joint"], ["control=true", "method=joint", "labels"]),
        (["control=true", "data=none"], ["control=true", "data=none"]),
        (
            ["control=true", "method=aiminify", "method.fine_tune=false"],
            ["control=true", "method=aiminify", "control=false"],
        ),
    ],
)
def test_it_is_refused_where_there_is_nothing_to_train_it_by(
    command: Command, words: list[str], expected: list[str]
) -> None:
    assert_refused(command, *QUICK, *words, expected=expected)
