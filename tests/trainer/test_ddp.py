"""Several processes: what a loss does not reach is found once, and the weights are those of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from jobs.test_distributed import in_two_processes
from nets import images, relative_error, small_net
from phase_runner import DIGITS, SPEC, runner
from vitrim.data.digits import Digits
from vitrim.jobs.distributed import process_group
from vitrim.method.vtp import GateTraining
from vitrim.trainer.classify import Classify
from vitrim.trainer.ddp import leaves_of
from vitrim.trainer.mimic import Distill, Mimic
from vitrim.trainer.recipe import Recipe

RECIPE = Recipe(epochs=1, lr=1e-3, weight_decay=0.05, warmup_epochs=0, clip_norm=1.0)
SCRIPT = "import test_ddp as tests; tests.train({folder!r}, 2)"


def net(seed: int = 0) -> torch.nn.Module:
    return small_net(dtype=torch.float32, seed=seed, **DIGITS)


PHASES: dict[str, Callable[[], Any]] = {
    "classify": lambda: Classify(net(), recipe=RECIPE, n_classes=10),
    "gates": lambda: GateTraining(net(), recipe=RECIPE, l1=1e-4, gate_lr=1e-2),
    "mimic": lambda: Mimic(net(1), net(), recipe=RECIPE),
    "pooled": lambda: Mimic(net(1), net(), recipe=RECIPE, pooled_weight=1.0),
    "distill": lambda: Distill(net(1), net(), recipe=RECIPE, temperature=2.0),
}
UNREACHED = {
    "mimic": {"net.head.weight", "net.head.bias"},
    "pooled": {"net.head.weight", "net.head.bias"},
}


@pytest.mark.parametrize("name", PHASES)
def test_what_a_loss_does_not_reach(name: str) -> None:
    phase = PHASES[name]()
    reached = {id(leaf) for leaf in leaves_of(phase.outputs(images(8, dtype=torch.float32)[:, :1]))}
    unreached = {key for key, p in phase.named_parameters() if id(p) not in reached}
    assert unreached == UNREACHED.get(name, set())


class Notes(Callback):
    """Notes whether every step looks for unused parameters, and what a validation found."""

    def __init__(self) -> None:
        self.found: list[bool] = []
        self.metrics: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        names = ("top1", "top5", "agreement", "val_loss")
        known = trainer.callback_metrics
        self.metrics = {name: float(known[name]) for name in names if name in known}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.found.append(getattr(trainer.model, "find_unused_parameters", False))


def train(folder: str, processes: int) -> None:
    """Train each phase with 32 images a step, in two batches; each process saves the weights."""
    options = {"devices": processes, **({"strategy": "ddp"} if processes > 1 else {})}
    place, rank = Path(folder), os.environ.get("RANK", "0")
    with process_group({"accelerator": "cpu", **options}):
        for name, make in PHASES.items():
            run, batch = runner(place), 16 // processes
            trainer = partial(
                run.trainer,
                **options,
                accumulate_grad_batches=2,
                limit_train_batches=8,
                check_val_every_n_epoch=1,
            )
            plain = Digits(
                batch_size=batch, held_out=0.2, shift=0.0, rotation=0.0, label_smoothing=0.1
            )
            run = replace(run, trainer=trainer, data=plain.module(SPEC))
            phase, notes = make(), Notes()
            run.run_or_load(place / name, phase, name=name, callbacks=[notes])
            assert len(notes.found) == 8
            assert not any(notes.found)
            assert all(parameter.requires_grad for parameter in phase.parameters())
            torch.save(phase.state_dict(), place / f"{name}-{rank}.pt")
            torch.save(notes.metrics, place / f"{name}-{rank}-metrics.pt")


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    train(str(tmp_path / "one"), 1)
    folder = tmp_path / "two"
    in_two_processes(SCRIPT.format(folder=str(folder)))
    for name, make in PHASES.items():
        files = (tmp_path / f"one/{name}-0.pt", folder / f"{name}-0.pt", folder / f"{name}-1.pt")
        one, first, second = map(torch.load, files)
        assert all(torch.equal(first[key], second[key]) for key in first)
        metrics = [torch.load(file.with_name(f"{file.stem}-metrics.pt")) for file in files]
        assert metrics[1] == metrics[2]
        assert metrics[1] == pytest.approx(metrics[0], rel=0.02), name
        assert len(metrics[0]) == 2
        for key in UNREACHED.get(name, ()):
            assert torch.equal(first[key], one[key]), key
        found, expected = (outputs_of(make(), weights) for weights in (first, one))
        assert relative_error(found, expected) < 1e-3, name


def outputs_of(phase: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    phase.load_state_dict(weights)
    with torch.no_grad():
        (logits,) = phase.eval().outputs(images(8, dtype=torch.float32, batch=8)[:, :1])[:1]
    assert isinstance(logits, torch.Tensor)
    return logits
