"""Training with VTP's gates: images per second, and what a profile says of idle time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vitrim.measure import count
from vitrim.method.vtp import GateTraining
from vitrim.network.timing import Stop, clock_of
from vitrim.trainer.recipe import Recipe, optimizer_and_schedule

from .loop import SameBatch, fit
from .scale import Finding, Scale

RECIPE = Recipe(epochs=1, lr=1e-4, weight_decay=0.05, warmup_epochs=0, clip_norm=0.0)
L1, GATE_LR, DROP_PATH = 1e-4, 1e-4, 0.1
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 3090": 71e12}
"""FLOP/s of dense bf16 products with sums in fp32, by a part of the device's name; data sheets."""
LEAST_OF_TIMM, LEAST_OF_PEAK, MOST_IDLE = 0.95, 0.35, 0.05
Steps = Callable[[int], None]


def findings(scale: Scale) -> Iterator[Finding]:
    """Measure images per second of three loops, in turns, and the idle time of one."""
    batch = _batch(scale)
    loops = {"timm": _timm(scale, batch), "gates": _gates(scale, batch)}
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(scale.warm_up)
    for _ in range(scale.turns):
        for name, loop in loops.items():
            rates[name].append(scale.steps * scale.batch / _seconds(scale, loop))
    best = {name: max(found) for name, found in rates.items()}
    best["Trainer"] = _with_trainer(scale, batch)
    yield Finding("timm's loop, dense", f"{best['timm']:,.0f} images/s")
    for name, what in (("gates", "gates, bare loop"), ("Trainer", "gates, Lightning's Trainer")):
        ratio = best[name] / best["timm"]
        goal, met = f">= {LEAST_OF_TIMM} x timm's", ratio >= LEAST_OF_TIMM
        yield Finding(what, f"{best[name]:,.0f} images/s, {ratio:.2f} x timm's", goal, met)
    yield _of_peak(scale, best["Trainer"])
    yield from _idle(scale, loops["gates"])


def _batch(scale: Scale) -> tuple[Tensor, Tensor]:
    labels = torch.arange(scale.batch, device=scale.device) % scale.n_classes
    return scale.images(scale.batch), labels


def _timm(scale: Scale, batch: tuple[Tensor, Tensor]) -> Steps:
    """Return the plain loop of timm's train.py: forward, backward, step, on the dense network."""
    net = scale.net(drop_path_rate=DROP_PATH).train()
    model: Callable[[Tensor], Tensor] = torch.compile(net) if scale.compiles else net
    on_gpu = scale.device != "cpu"
    optimizer = create_optimizer_v2(
        net, opt="adamw", lr=RECIPE.lr, weight_decay=RECIPE.weight_decay, fused=on_gpu
    )
    images, labels = batch

    def steps(n: int) -> None:
        for _ in range(n):
            with scale.bf16():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def _phase(scale: Scale) -> GateTraining:
    net = scale.net(drop_path_rate=DROP_PATH).train()
    phase = GateTraining(net, recipe=RECIPE, l1=L1, gate_lr=GATE_LR).to(scale.device)
    if scale.compiles:
        phase.compile()  # of its forward pass, gates included
    return phase


def _gates(scale: Scale, batch: tuple[Tensor, Tensor]) -> Steps:
    """Return a loop over the steps of the gates' phase, without a Trainer."""
    phase = _phase(scale)
    phase.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    group = {"params": list(phase.gates), "lr": GATE_LR, "weight_decay": 0.0}
    optimizer, schedule = optimizer_and_schedule(phase.net, RECIPE, steps=10_000, extra=[group])

    def steps(n: int) -> None:
        for index in range(n):
            optimizer.zero_grad()
            with scale.bf16():
                loss = phase.training_step(batch, index)
            loss.backward()
            optimizer.step()
            schedule.step()

    return steps


class _Timed(Callback):
    """Times the steps of a fit that follow the warm-up."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.seconds = 0.0
        self._stop: Stop | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: object, batch_idx: int
    ) -> None:
        if batch_idx == self.scale.warm_up:
            self._stop = clock_of(self.scale.device).start()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert self._stop is not None
        self.seconds = self._stop()() / 1e3


def _with_trainer(scale: Scale, batch: tuple[Tensor, Tensor]) -> float:
    """Return the images per second of the gates' phase in a Trainer."""
    n, timed = scale.steps * scale.turns, _Timed(scale)
    fit(scale, _phase(scale), SameBatch(batch, scale.warm_up + n), [timed])
    return n * scale.batch / timed.seconds


def _seconds(scale: Scale, loop: Steps) -> float:
    stop = clock_of(scale.device).start()
    loop(scale.steps)
    return stop()() / 1e3


def _of_peak(scale: Scale, rate: float) -> Finding:
    """Return which share of the device's bf16 peak a rate needs: a step is three passes."""
    flops = 3 * count(scale.net(), scale.side).flops * rate
    device = torch.cuda.get_device_name() if scale.device != "cpu" else "CPU"
    peak = next((peak for part, peak in PEAKS.items() if part in device), None)
    what = f"gates, Lightning's Trainer, on {device}"
    if peak is None:
        return Finding(what, f"{flops / 1e12:,.2f} TFLOP/s; the peak of this device is not known")
    share = flops / peak
    goal, met = f">= {LEAST_OF_PEAK:.0%} of the peak", share >= LEAST_OF_PEAK
    return Finding(what, f"{flops / 1e12:,.0f} TFLOP/s, {share:.0%} of the bf16 peak", goal, met)


def _idle(scale: Scale, loop: Steps) -> Iterator[Finding]:
    """Return how much of a profile the device waits, and what takes its time."""
    activities = [ProfilerActivity.CPU]
    kind = DeviceType.CPU
    if scale.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
        kind = DeviceType.CUDA
    with profile(activities=activities, acc_events=True) as profiled:
        loop(scale.profiled)
        if scale.device != "cpu":
            torch.cuda.synchronize()
    events = [
        event
        for event in profiled.events() or ()
        if event.device_type == kind and not event.is_user_annotation  # spans over idle time
    ]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    idle = 1 - busy / (reached - spans[0][0])
    what = f"profile of {scale.profiled} steps with gates"
    goal, met = f"idle <= {MOST_IDLE:.0%}", idle <= MOST_IDLE
    yield Finding(what, f"idle {idle:.1%} in {len(spans):,} intervals", goal, met)
    totals: dict[str, float] = {}
    for event in events:
        totals[event.name] = totals.get(event.name, 0.0) + event.time_range.elapsed_us()
    for name in sorted(totals, key=lambda name: -totals[name])[:5]:
        yield Finding(f"  {name[:60]}", f"{totals[name] / 1e3 / scale.profiled:.2f} ms a step")
