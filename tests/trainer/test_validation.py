"""Phases are validated where that is asked for, and train as without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recovery import PLAIN, runner_data, settings
from torch import Tensor, nn

from nets import plan_of, small_net
from phase_runner import DIGITS, At, runner, stop
from vitrim import cut
from vitrim.jobs import signals
from vitrim.method.vtp import GateTraining
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Distill, Mimic
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.recovery import Recovery
from vitrim.trainer.tracking import Tracker
from vitrim.trainer.views import Views

RECIPE = Recipe(epochs=2, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0, ema_decay=0.9)


def teacher() -> nn.Module:
    return small_net(dtype=torch.float32, drop_rate=0.2, **DIGITS)


def student() -> nn.Module:
    return cut(teacher(), plan_of({"blocks.0.mlp.hidden": range(20)}))


def recovery() -> Recovery:
    training = replace(RECIPE, ema_decay=0.0)
    how = settings(views=Views(**PLAIN), training=training, held_out=0.0, patience=None)
    return Recovery(student(), teacher(), settings=how, images=64)


SLOW = ("classify", "distill")
PHASES: dict[str, Callable[[], Any]] = {
    "gates": lambda: GateTraining(student(), recipe=RECIPE, l1=1e-4, gate_lr=1e-2),
    "mimic": lambda: Mimic(student(), teacher(), recipe=RECIPE, logits_weight=0.5),
    "distill": lambda: Distill(student(), teacher(), recipe=RECIPE, temperature=2.0),
    "recovery": recovery,
    "classify": lambda: Classify(student(), recipe=RECIPE, n_classes=10),
}


def trained(phase: Any, folder: Path, *callbacks: Any, **options: Any) -> list[dict[str, float]]:
    """Train a phase; return the logged metrics of its validations."""
    run = runner(folder)
    options = {"limit_train_batches": 2, **options}
    run = replace(
        run,
        trainer=partial(run.trainer, **options),
        tracker=Tracker(folder, "none", group="", config={}),
    )
    run.run_or_load(folder / "x", phase, name="x", callbacks=callbacks)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "top1" in line or "agreement" in line]


def digits() -> Iterable[tuple[Tensor, Tensor]]:
    batches: Any = runner_data().val_dataloader()
    return [*batches]


@torch.no_grad()
def share(net: nn.Module, wanted: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return the percentage of digits for which the network says what is wanted."""
    hits = [net.eval()(x).argmax(-1) == wanted(x, y) for x, y in digits()]
    return 100 * float(torch.cat(hits).double().mean())


@pytest.mark.parametrize(
    "name",
    ["gates", "mimic", "recovery", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)],
)
def test_a_validation_is_logged_and_changes_nothing(name: str, tmp_path: Path) -> None:
    plain, validated = (PHASES[name]() for _ in range(2))
    assert trained(plain, tmp_path / "plain", check_val_every_n_epoch=None) == []
    found = trained(validated, tmp_path / "validated", check_val_every_n_epoch=1)
    assert len(found) == RECIPE.epochs
    states = plain.state_dict(), validated.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    last = found[-1]
    if name in ("classify", "gates"):
        net = validated if name == "gates" else validated.net
        assert last["top1"] == pytest.approx(share(net, lambda x, y: y), abs=1e-3)
        assert last["top1"] <= last["top5"] <= 100
    else:
        dense = teacher().eval()
        expected = share(validated.net, lambda x, y: dense(x).argmax(-1))
        assert last["agreement"] == pytest.approx(expected, abs=1e-3)
        assert last["val_loss"] > 0


def test_without_images_to_judge_by_there_is_none(tmp_path: Path) -> None:
    assert trained(PHASES["mimic"](), tmp_path, limit_val_batches=0) == []


def test_stopped_at_the_end_of_an_epoch_a_validated_phase_ends_the_same(tmp_path: Path) -> None:
    options = {"check_val_every_n_epoch": 1}
    whole, again = (PHASES["gates"]() for _ in range(2))
    expected = trained(whole, tmp_path / "whole", **options)
    with signals.handled(), pytest.raises(signals.Preempted):
        trained(PHASES["gates"](), tmp_path, At(2, stop()), **options)
    found = trained(again, tmp_path, **options)
    assert [line["top1"] for line in found] == [line["top1"] for line in expected]
    states = whole.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
