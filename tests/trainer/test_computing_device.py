"""A run computes closed forms on its Trainer's device, from scoring to the cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from nets import small_net
from phase_runner import DIGITS, runner
from second_device import SECOND
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.network.computing import computing_device
from vitrim.plan import Evidence, Proposal
from vitrim.prune import Slicing
from vitrim.trainer.collect import Collect


class Scored(Collect):
    """Notes where closed forms are computed as its training ends."""

    def on_train_end(self) -> None:
        super().on_train_end()
        self.seen = computing_device()


class Method:
    """Notes where closed forms are computed as it plans and compensates."""

    granularity = "none"

    def __init__(self) -> None:
        self.seen: dict[str, torch.device | None] = {}

    def plan(self, net: Any, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        self.seen["plan"] = computing_device()
        return Proposal(edits=())

    def compensation_of(self, *_: object) -> Mapping[str, Tensor]:
        self.seen["compensation"] = computing_device()
        return {}


class RootDevice(Callback):
    """Notes the device of the Trainer."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.device = trainer.strategy.root_device


def parts() -> tuple[Scored, Method, Slicing]:
    net, method = small_net(dtype=torch.float32, **DIGITS), Method()
    slicing = Slicing(method, Cost(net, (8, 8)), Target(metric="macs", keep=1.0))  # type: ignore[arg-type]
    return Scored(net, images=8), method, slicing


def test_phases_compute_on_the_device_of_their_trainer(tmp_path: Path) -> None:
    phase, method, slicing = parts()
    root = RootDevice()
    runner(tmp_path).run_or_load(tmp_path / "x", phase, name="x", callbacks=[root, slicing])
    assert root.device == torch.device("cpu")
    assert phase.seen == root.device
    assert method.seen == {"plan": root.device, "compensation": root.device}
    assert computing_device() is None


def test_slicing_computes_on_the_device_of_any_trainer() -> None:
    phase, method, slicing = parts()
    phase.pixels = torch.zeros(1, 1, 8, 8)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=SECOND))
    slicing.on_fit_end(trainer, phase)
    assert method.seen == {"plan": SECOND, "compensation": SECOND}
    assert computing_device() is None
