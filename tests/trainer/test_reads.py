"""A step does not wait for the device: a scalar is read at most once in 50 steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from nets import small_net
from phase_runner import DIGITS, runner
from vitrim.method.vtp import GateTraining
from vitrim.trainer.calibrate import Calibrate, Sampling
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Distill, Mimic
from vitrim.trainer.recipe import Recipe

RECIPE = Recipe(
    epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=1.0, optimizer="sgd"
)
STEPS = 50


class Reads(TorchDispatchMode):
    """Counts what is read of tensors, and the copies that a list of numbers would need."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Counted(Callback):
    """Counts the reads of 50 steps, from the second batch on."""

    def __init__(self) -> None:
        self.reads = Reads()
        self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 2:
            self.reads.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.steps += 1 < ready <= STEPS + 1
        if ready == STEPS + 1:
            self.reads.__exit__(None, None, None)


def net() -> torch.nn.Module:
    return small_net(dtype=torch.float32, **DIGITS)


def calibrate() -> LightningModule:
    sampling = Sampling(images=1000, tokens=2, class_token_weight=1.0)
    sites = ("blocks.0.mlp.hidden",)
    return Calibrate(net(), sites=sites, sampling=sampling, taylor=False)


PHASES: dict[str, Callable[[], Any]] = {
    "classify": lambda: Classify(net(), recipe=RECIPE, n_classes=10),
    "gates": lambda: GateTraining(net(), recipe=RECIPE, l1=1e-4, gate_lr=1e-3),
    "mimic": lambda: Mimic(net(), net(), recipe=RECIPE),
    "distill": lambda: Distill(net(), net(), recipe=RECIPE, temperature=2.0),
    "calibrate": calibrate,
}


@pytest.mark.parametrize(
    "name",
    [
        "classify",
        "calibrate",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gates", "mimic", "distill")),
    ],
)
def test_a_scalar_is_read_once_in_fifty_steps(name: str, tmp_path: Path) -> None:
    run = runner(tmp_path, batch_size=16)
    run = replace(run, trainer=partial(run.trainer, log_every_n_steps=100))
    counted = Counted()
    run.run_or_load(tmp_path / "x", PHASES[name](), name="x", callbacks=[counted])
    assert counted.steps == STEPS
    assert counted.reads.number <= 1
