"""The runner of phases: what it refuses, what it does before a phase, and what it leaves alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import nn

from nets import randomise, small_net
from phase_runner import DIGITS, runner
from vitrim.errors import ConfigError
from vitrim.trainer import phases
from vitrim.trainer.classify import Classify
from vitrim.trainer.collect import Collect
from vitrim.trainer.phases import quiet_lightning
from vitrim.trainer.recipe import Recipe

RECIPE = Recipe(epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=1.0)
NAMES = ("lightning.pytorch", "lightning.fabric")


def classify(recipe: Recipe = RECIPE) -> Classify:
    net = small_net(dtype=torch.float32, **DIGITS)
    return Classify(net, recipe=recipe, n_classes=10)


def collect() -> Collect:
    return Collect(small_net(dtype=torch.float32, **DIGITS), images=20)


@pytest.mark.parametrize(
    ("make", "images"),
    [
        (classify, [32]),
        (lambda: classify(replace(RECIPE, epochs=0)), []),
        (collect, []),
    ],
    ids=["trained", "no epochs", "not trained"],
)
def test_batchnorms_are_estimated_before_training_and_only_then(
    make: Callable[[], Any], images: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated: list[tuple[nn.Module, int]] = []

    def note(net: nn.Module, batches: Callable[[], Iterable[Any]]) -> None:
        estimated.append((net, sum(len(x) for x, _ in batches())))

    monkeypatch.setattr(phases, "estimate_batchnorm", note)
    phase = make()
    runner(tmp_path).run_or_load(tmp_path / "x", phase, name="x")
    assert estimated == [(phase.net, n) for n in images]
    estimated.clear()
    runner(tmp_path).run_or_load(tmp_path / "x", make(), name="x")  # loaded from disk
    assert estimated == []


def test_as_many_images_are_seen_as_the_phase_asks_for(tmp_path: Path) -> None:
    phase = collect()
    runner(tmp_path, batch_size=8).run_or_load(tmp_path / "x", phase, name="x")
    assert phase.evidence().images.shape == (20, 1, 8, 8)
    again = collect()
    runner(tmp_path).run_or_load(tmp_path / "x", again, name="x")
    assert torch.equal(again.evidence().images, phase.evidence().images)


def test_gradients_are_clipped_as_the_phase_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped: list[float] = []

    def clip(parameters: Iterable[nn.Parameter], max_norm: float, *args: Any, **kw: Any) -> None:
        clipped.append(max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    for bound in (0.25, 0.0):
        folder = tmp_path / str(bound)
        phase = classify(replace(RECIPE, clip_norm=bound))
        runner(folder).run_or_load(folder / "x", phase, name="x")
    assert set(clipped) == {0.25}


def test_a_phase_that_lacks_a_member_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Forgetful(LightningModule):
        net, epochs, calibration_images = small_net(), 1, 8
        clip_norm, trains = 0.0, False

    with pytest.raises(ConfigError, match="Forgetful lacks resumes_at"):
        runner(tmp_path).run_or_load(tmp_path / "x", Forgetful(), name="x")
    assert not (tmp_path / "x").exists()


def test_an_accuracy_is_computed_once(tmp_path: Path) -> None:
    net = small_net(dtype=torch.float32, **DIGITS)
    first = runner(tmp_path).evaluate(tmp_path / "x", net, 10)
    assert first.keys() == {"top1", "top5", "images"}
    other = randomise(small_net(dtype=torch.float32, **DIGITS), seed=5)
    assert runner(tmp_path).accuracy(other, 10) != first
    assert runner(tmp_path).evaluate(tmp_path / "x", other, 10) == first


def test_lightning_is_quiet_only_within() -> None:
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [logger.level for logger in loggers], [*warnings.filters]
    loggers[1].setLevel(logging.ERROR)
    try:
        with quiet_lightning():
            assert [logger.level for logger in loggers] == [logging.WARNING, logging.ERROR]
            warnings.warn("the loader does not have many workers which may", stacklevel=1)
            with pytest.raises(UserWarning, match="of somebody else"):  # an error in these tests
                warnings.warn("of somebody else", stacklevel=1)
        assert loggers[1].level == logging.ERROR
    finally:
        loggers[1].setLevel(before[0][1])
    assert ([logger.level for logger in loggers], [*warnings.filters]) == before


def test_without_checkpoints_no_state_is_kept(tmp_path: Path) -> None:
    phases_of = replace(runner(tmp_path), checkpoint_minutes=None)
    phase = classify()
    before = [parameter.clone() for parameter in phase.net.parameters()]
    phases_of.run_or_load(tmp_path / "x", phase, name="x")
    assert not all(map(torch.equal, before, phase.net.parameters()))
    assert not [path for path in tmp_path.rglob("*.safetensors")]
