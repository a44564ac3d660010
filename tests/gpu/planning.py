"""One-shot pruning as a run does it: how long planning takes after the calibration."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.cli.compose import CONF
from vitrim.plan import Edit, Keep
from vitrim.prune import Slicing

from .loop import SameBatch, fit
from .scale import Finding, Scale

MOST_S = 2.0
KEPT = 0.6
BATCHES = 16
"""Of the calibration: with batches of 64 as many images as conf/method/oneshot.yaml has."""


@cache
def method_of(kind: str, name: str) -> Any:
    """Return the method `kind` with its yaml's numbers for timm's network `name`."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={kind}", "model=timm", f"model.name={name}"])
    return instantiate(cfg.method, _convert_="all")


class _Ended(Callback):
    """Notes when training starts and ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if next(pl_module.parameters()).is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def findings(scale: Scale) -> Iterator[Finding]:
    """Measure the calibration, and what follows its end: ranking, planning, cutting, folding."""
    net, method = scale.net().eval(), method_of("oneshot", scale.name)
    cost = Cost(net, scale.side)
    slicing = Slicing(method, cost, Target(metric="macs", keep=KEPT), name="oneshot")
    phase, ended = method.scorer(net), _Ended()
    batch = scale.images(min(scale.batch, 64))
    labels = torch.zeros(len(batch), dtype=torch.int64, device=scale.device)
    loader = SameBatch((batch, labels), BATCHES)
    fit(scale, phase, loader, [ended, slicing], epochs=phase.epochs, precision="32-true")
    planned = time.perf_counter()
    start, end = ended.times
    yield Finding(f"one-shot, calibration on {BATCHES * len(batch)} images", f"{end - start:.2f} s")
    seconds = planned - end
    what = f"one-shot: rank, plan, cut, fold, closed forms on {scale.device}"
    yield Finding(what, f"{seconds:.2f} s", f"<= {MOST_S:g} s", seconds <= MOST_S)
    edits, began = slicing.plan.edits, time.perf_counter()
    slicing.slice(phase.net, slicing.evidence)  # outside of the Trainer: where they lie
    on_cpu = time.perf_counter() - began
    yield Finding("one-shot: the same, closed forms on the CPU", f"{on_cpu:.2f} s")
    yield Finding("one-shot: units kept in both", f"{_shared(edits, slicing.plan.edits):.2%}")


def _shared(edits: Iterable[Edit], others: Iterable[Edit]) -> float:
    """Return the share of the units that one plan keeps which another one keeps too."""
    kept, also = (
        {(edit.site, unit) for edit in plan if isinstance(edit, Keep) for unit in edit.index}
        for plan in (edits, others)
    )
    return len(kept & also) / max(1, len(kept))
