"""Optimisers and schedules by name: those of timm, and the cosine that every phase has by default.

A schedule multiplies the rates of all parameter groups by one factor, which depends on the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import cast

import torch
from timm.optim import (
    create_optimizer_v2,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

_OF_TIMM = ("poly", "step", "tanh")


@cache
def optimizer_names() -> Sequence[str]:
    """Return the names of optimisers."""
    return [*list_optimizers()]


def schedule_names() -> Sequence[str]:
    """Return the names of schedules."""
    return ["cosine", "constant", *_OF_TIMM]


def new_optimizer(
    net: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float | None,
    layer_decay: float | None,
    extra: Sequence[Mapping[str, object]],
    clips: bool,
) -> Optimizer:
    """Return an optimiser of the trainable parameters of `net`, and of the groups in `extra`.

    AdamW is fused on a GPU, unless gradients are clipped: Lightning does not clip for it.
    """
    if layer_decay is None:
        own = param_groups_weight_decay(net, weight_decay)
    else:
        own = param_groups_layer_decay(net, weight_decay, layer_decay=layer_decay)
        own = [{**group, "lr": lr * group["lr_scale"]} for group in own]
    groups = [dict(group) for group in (*own, *extra)]
    groups = [group for group in groups if len(cast(Sequence[object], group["params"]))]
    if name == "adamw":
        on_gpu = any(parameter.is_cuda for parameter in net.parameters())
        return AdamW(groups, lr=lr, fused=True if on_gpu and not clips else None)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=0.9 if momentum is None else momentum)
    options = {} if momentum is None else {"momentum": momentum}
    return cast(Optimizer, create_optimizer_v2(groups, opt=name, lr=lr, **options))


def new_schedule(
    optimizer: Optimizer,
    name: str,
    *,
    lr: float,
    steps: int,
    warmup: float,
    warmup_lr: float | None,
    min_lr: float,
    decay: tuple[float, float],
) -> LRScheduler:
    """Return a schedule over `steps` steps, `warmup` of which come before the peak `lr`.

    Args:
        optimizer: whose rates are scaled.
        name: cosine, constant, or one of timm's.
        lr: the peak, relative to which `warmup_lr` and `min_lr` are.
        steps: in all.
        warmup: steps of it.
        warmup_lr: the rate of the first step; None: its share of the warm-up.
        min_lr: the rate at the end.
        decay: steps between two decays, and their factor, of step.
    """
    start, end = (
        None if rate is None else rate / lr if lr else 0.0 for rate in (warmup_lr, min_lr)
    )
    after = _after_warmup(name, max(steps - warmup, 1), end or 0.0, decay)

    def scale(step: int) -> float:
        if step >= warmup:
            return after(step - warmup)
        if start is None:
            return (step + 1) / (warmup + 1)
        return start + (1 - start) * step / warmup

    return LambdaLR(optimizer, scale)


def _after_warmup(
    name: str, steps: float, end: float, decay: tuple[float, float]
) -> Callable[[float], float]:
    """Return the factor by the number of steps since the peak."""
    if name == "constant":
        return lambda step: 1.0
    if name == "cosine":
        return lambda step: _cosine(min(step / steps, 1.0), end)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=name,
        num_epochs=max(round(steps), 1),
        step_on_epochs=True,
        min_lr=end,
        warmup_epochs=0,
        decay_epochs=max(decay[0], 1e-9),
        decay_rate=decay[1],
    )

    def factor(step: float) -> float:
        schedule.step(min(round(step), round(steps)))
        return float(optimizer.param_groups[0]["lr"])

    return factor


def _cosine(share: float, end: float) -> float:
    """Return the factor after a share of the steps.

    >>> _cosine(0.0, 0.1), round(_cosine(1.0, 0.1), 9)
    (1.0, 0.1)
    """
    factor = 0.5 + 0.5 * math.cos(math.pi * share)
    return factor if not end else end + (1 - end) * factor
