"""Trials of dense compression: a step towards kept features against the naive loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from vitrim.plan import Drop, Keep, Plan
from vitrim.surgery import cut
from vitrim.trainer.trial import frozen, step

from .scoring import net_of
from .timing import Row, Side, take_turns

NET = "vit_tiny_patch16_224"
BATCH = 32
STEPS = 3
BLOCKS = (1, 5, 10)
"""The first, a middle and the last block of those that are tried."""


def rows(repeats: int) -> list[Row]:
    """Return the steps of trials in float32, with equal losses, and in bfloat16."""
    teacher = net_of(NET)
    batches = [torch.randn(BATCH, 3, 224, 224) for _ in range(STEPS)]
    with torch.no_grad():
        aims = [teacher.forward_features(x) for x in batches]  # type: ignore[operator]
    naive = {at: _naive(teacher, at, batches) for at in BLOCKS}
    ours = {at: _ours(teacher, at, batches, aims, nullcontext) for at in BLOCKS}
    for at in BLOCKS:
        for mine, theirs in zip(ours[at](), naive[at](), strict=True):
            assert abs(mine - theirs) <= 1e-6 * abs(theirs), (at, mine, theirs)
    half = {at: _ours(teacher, at, batches, aims, _bfloat16) for at in BLOCKS}
    return [
        _row("float32, losses equal to 1e-6", ours, naive, 1.5, repeats),
        _row("bfloat16", half, naive, 2.8, repeats),
    ]


Loops = dict[int, Callable[[], list[float]]]


def _row(what: str, ours: Loops, naive: Loops, limit: float, repeats: int) -> Row:
    sides = {
        "ours": Side(work=lambda _: [loop() for loop in ours.values()]),
        "peer": Side(work=lambda _: [loop() for loop in naive.values()]),
    }
    seconds = take_turns(sides, repeats)
    return Row(
        name=f"trials of blocks 1, 5 and 10 of ViT-Ti, {what}",
        peer="teacher in every step, full backward, float32",
        ours_s=seconds["ours"],
        peer_s=seconds["peer"],
        kind="faster",
        limit=limit,
    )


def _bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _candidate(teacher: nn.Module, at: int) -> nn.Module:
    hidden = Keep(site=f"blocks.{at}.mlp.hidden", index=tuple(range(0, 768, 2)))
    plan = Plan(model={}, edits=(Drop(branch=f"blocks.{at}.attn"), hidden))
    return cut(teacher, plan).train()


def _ours(
    teacher: nn.Module,
    at: int,
    batches: list[Tensor],
    aims: list[Tensor],
    precision: Callable[[], AbstractContextManager[Any]],
) -> Callable[[], list[float]]:
    def loop() -> list[float]:
        net = _candidate(teacher, at)
        fixed = frozen(net, [f"blocks.{at}"], front=True)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name not in fixed)
        trained = [tensor for tensor in net.parameters() if tensor.requires_grad]
        optimizer, losses = AdamW(trained, lr=1e-4), []
        for x, aim in zip(batches, aims, strict=True):
            with precision():
                losses.append(step(net, x, aim, optimizer, 0.0, torch.Tensor.backward).item())
        return losses

    return loop


def _naive(teacher: nn.Module, at: int, batches: list[Tensor]) -> Callable[[], list[float]]:
    teacher = copy.deepcopy(teacher)

    def loop() -> list[float]:
        net = _candidate(teacher, at)
        fixed = frozen(net, [f"blocks.{at}"], front=True)
        trained = [tensor for name, tensor in net.named_parameters() if name not in fixed]
        optimizer, losses = AdamW(trained, lr=1e-4), []
        for x in batches:
            with torch.no_grad():
                aim = teacher.forward_features(x)  # type: ignore[operator]
            loss = (net.forward_features(x) - aim).square().mean()  # type: ignore[operator]
            net.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop
