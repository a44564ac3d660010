"""What remains of a training: averaged weights, or the best ones, also after a stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from command import QUICK, Command
from nets import small_net
from phase_runner import DIGITS, At, runner, stop
from vitrim.errors import ConfigError
from vitrim.jobs import signals
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Mimic
from vitrim.trainer.phases import LAST
from vitrim.trainer.recipe import Recipe

RECIPE = Recipe(epochs=1, lr=1e-2, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)
BEST = replace(RECIPE, epochs=3, lr=0.1, scheduler="constant", keep="best")


def trained(folder: Path, recipe: Recipe, *, stop_at: int | None = None, **options: Any) -> Any:
    """Return a trained phase, stopped and resumed once."""
    run = runner(folder)
    run = replace(run, trainer=partial(run.trainer, **options))

    def phase() -> Classify:
        torch.manual_seed(0)
        net = small_net(dtype=torch.float32, **DIGITS)
        return Classify(net, recipe=recipe, n_classes=10).train()

    if stop_at is not None:
        with signals.handled(), pytest.raises(signals.Preempted):
            run.run_or_load(folder / "phase", phase(), name="x", callbacks=[At(stop_at, stop())])
    last = phase()
    run.run_or_load(folder / "phase", last, name="x")
    return last


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_average_remains_and_survives_a_stop(tmp_path: Path) -> None:
    average = replace(RECIPE, ema_decay=0.99)
    plain, whole, stopped, at_the_end = (
        trained(tmp_path / name, recipe, stop_at=at).state_dict()
        for name, recipe, at in (
            ("a", RECIPE, None),
            ("b", average, None),
            ("c", average, 2),
            ("d", average, 5),  # the last step
        )
    )
    assert not same(plain, whole)
    assert same(whole, stopped)
    assert same(whole, at_the_end)


EVERY = {"check_val_every_n_epoch": 1, "limit_train_batches": 2}


def accuracies(folder: Path) -> list[float]:
    """Return the accuracy after each of the epochs, from trainings of so many."""
    runs = [replace(BEST, epochs=n, keep="last") for n in range(1, BEST.epochs + 1)]
    found = []
    for recipe in runs:
        place = folder / str(recipe.epochs)
        phase = trained(place, recipe, **EVERY)
        found.append(runner(place).accuracy(phase.net, 10)["top1"])
    return found


def test_the_best_weights_remain_and_survive_a_stop(tmp_path: Path) -> None:
    found = accuracies(tmp_path)
    best = 1 + found.index(max(found))
    assert best < BEST.epochs, "the last epoch is the best: this training shows nothing"
    files = [tmp_path / str(n) / "phase" / "state.safetensors" for n in (best, BEST.epochs)]
    wanted, last = map(load_file, files)
    for step in (None, 2 * best, 2 * BEST.epochs):
        folder = tmp_path / f"best-{step}"
        assert same(trained(folder, BEST, stop_at=step, **EVERY).state_dict(), wanted)
        assert same(load_file(folder / "phase" / "state.safetensors"), wanted)
        assert same(load_file(folder / "phase" / LAST), last)
        assert same(trained(folder, BEST).state_dict(), wanted)  # loaded


def test_the_best_average_remains(tmp_path: Path) -> None:
    recipe = replace(BEST, epochs=2, ema_decay=0.9)
    phase = trained(tmp_path, recipe, stop_at=3, **EVERY)
    averages = [load_file(tmp_path / "phase" / name) for name in ("state.safetensors", LAST)]
    wanted = trained(tmp_path / "last", replace(recipe, keep="last"), **EVERY).state_dict()
    assert same(averages[1], wanted)
    assert same(phase.state_dict(), averages[0])


def test_the_last_epoch_is_validated_too(tmp_path: Path) -> None:
    phase = trained(tmp_path, BEST, check_val_every_n_epoch=2)
    assert phase.trainer.check_val_every_n_epoch == 1


@pytest.mark.slow
def test_mimicking_keeps_what_agrees_most_with_the_teacher(tmp_path: Path) -> None:
    nets = [small_net(dtype=torch.float32, seed=seed, **DIGITS) for seed in (0, 1)]
    run = runner(tmp_path)
    run = replace(run, trainer=partial(run.trainer, **EVERY))
    run.run_or_load(tmp_path / "x", Mimic(*nets, recipe=replace(BEST, epochs=2)), name="x")
    assert (tmp_path / "x" / LAST).is_file()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"check_val_every_n_epoch": 5}, "every 5 epochs, and epochs=3"),
        ({"check_val_every_n_epoch": None}, "every 10 epochs, and epochs=3"),
        ({"limit_val_batches": 0}, "it needs validation images"),
    ],
)
def test_without_a_choice_there_is_no_best(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        trained(tmp_path, BEST, **options)


@pytest.mark.slow
def test_a_run_has_the_last_weights_beside_the_best(command: Command) -> None:
    words = (*QUICK, "method.gating.epochs=1", "method.fine_tuning.epochs=2")
    best = ("method.fine_tuning.keep=best", "trainer.check_val_every_n_epoch=1")
    folder = command(*words, *best, "strength=3").report.parent
    last, model = (load_file(folder / name) for name in (f"classify-{LAST}", "model.safetensors"))
    assert {name.removeprefix("net.") for name in last} == {*model}
