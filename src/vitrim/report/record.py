"""The record of a run: the numbers of its report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.measure import Count, Latency, count
from vitrim.plan import Plan

Accuracy = Mapping[str, float] | None


"""Percent by name (top1, top5), or None where no images were at hand."""


def record(
    nets: tuple[nn.Module, nn.Module],
    cost: Cost,
    plan: Plan,
    times: Sequence[Latency],
    dense_accuracy: Accuracy,
    stages: Mapping[str, Accuracy],
    budget: Target,
) -> dict[str, Any]:
    """Return the numbers of a report: the dense net, the compact one, and what was kept.

    `stages` are the compact net's accuracies right after the cut and after each phase that
    followed. The compact net is counted, and the closed formula must agree.
    """
    sizes = [Count(*cost.dense_count), count(nets[1], cost.input_size)]
    formula = cost.plan(plan)
    if (formula.params, formula.macs) != sizes[1][:2]:
        raise AssertionError(f"the plan's formula gives {formula}, the counter {sizes[1]}")
    sides = [
        {**size._asdict(), **_percent(accuracy), **_milliseconds(latency)}
        for size, accuracy, latency in zip(
            sizes, (dense_accuracy, [*stages.values()][-1]), times, strict=True
        )
    ]
    return {
        "format": 1,
        "dense": sides[0],
        "compact": sides[1],
        "cut": _percent(stages["cut"]),
        "stages": {name: _percent(accuracy) for name, accuracy in stages.items()},
        "target": {"metric": budget.metric, "keep": budget.keep},
        "kept": {name: sides[1][name] / sides[0][name] for name in ("params", "macs")},
    }


def _milliseconds(latency: Latency) -> dict[str, Any]:
    blocks = {name: [part.mean, part.std] for name, part in latency.blocks.items()}
    found = {
        "latency_ms": latency.median,
        "latency_mean_ms": latency.mean,
        "latency_std_ms": latency.std,
    }
    return found | ({"blocks_ms": blocks} if blocks else {})


def _percent(accuracy: Accuracy) -> dict[str, float | None]:
    return {name: None if accuracy is None else accuracy[name] for name in ("top1", "top5")}
