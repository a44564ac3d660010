"""Weights are averaged while a phase trains, and the average is what remains, also after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import small_net
from phase_runner import DIGITS, At, runner, stop
from vitrim.jobs import signals
from vitrim.trainer.classify import Classify
from vitrim.trainer.recipe import Recipe


def trained(folder: Path, *, ema_decay: float, stop_at: int | None = None) -> torch.Tensor:
    """Return the classifier after training for an epoch of six steps, stopped and resumed once."""
    recipe = Recipe(
        epochs=1, lr=1e-2, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0, ema_decay=ema_decay
    )

    def phase() -> Classify:
        torch.manual_seed(0)
        return Classify(
            small_net(dtype=torch.float32, **DIGITS), recipe=recipe, n_classes=10
        ).train()

    if stop_at is not None:
        with signals.handled(), pytest.raises(signals.Preempted):
            runner(folder).run_or_load(
                folder / "phase", phase(), name="x", callbacks=[At(stop_at, stop())]
            )
    last = phase()
    runner(folder).run_or_load(folder / "phase", last, name="x")
    return last.net.get_parameter("head.weight").detach()


def test_the_average_remains_and_survives_a_stop(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", ema_decay=0.0)
    average = trained(tmp_path / "average", ema_decay=0.99)
    stopped = trained(tmp_path / "stopped", ema_decay=0.99, stop_at=2)
    assert not torch.equal(plain, average)
    assert torch.equal(average, stopped)
