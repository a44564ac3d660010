"""The numbers of report.json: the dense network, the compact one, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vitrim.deploy.runfolder import FORMAT
from vitrim.paper import flops_blog
from vitrim.plan import Plan

if TYPE_CHECKING:
    from vitrim.budget.cost import Cost
    from vitrim.budget.target import Target
    from vitrim.measure import Count, Latency

Accuracy = Mapping[str, float] | None
"""Percent by name (top1, top5), or None where there were no images."""


def record(
    cost: Cost,
    compact_count: Count,
    plan: Plan,
    times: Sequence[Latency],
    dense_accuracy: Accuracy,
    stages: Mapping[str, Accuracy],
    target: Target,
) -> dict[str, object]:
    """Return the numbers of a report.

    Args:
        cost: the closed formula of the dense network, with its count.
        compact_count: of the compact network; the formula must agree.
        plan: from the dense network to the compact one.
        times: latency of the dense and of the compact network.
        dense_accuracy: of the dense network.
        stages: accuracy of the compact network right after the cut and after each phase of the
            recovery.
        target: what was allowed to remain.
    """
    formula = cost.plan(plan)
    if (formula.params, formula.macs) != (compact_count.params, compact_count.macs):
        raise AssertionError(f"the plan's formula gives {formula}, the counter {compact_count}")
    dense_count, final = cost.dense_count, [*stages.values()][-1]
    dense = _side(dense_count, dense_accuracy, times[0], _flops_blog(cost, plan, edits=False))
    compact = _side(compact_count, final, times[1], _flops_blog(cost, plan, edits=True))
    return {
        "format": FORMAT,
        "dense": dense,
        "compact": compact,
        "cut": _percent(stages["cut"]),
        "stages": {name: _percent(accuracy) for name, accuracy in stages.items()},
        "target": {"metric": target.metric, "keep": target.keep},
        "kept": {
            "params": compact_count.params / dense_count.params,
            "macs": compact_count.macs / dense_count.macs,
        },
    }


def _side(
    counted: Count, accuracy: Accuracy, latency: Latency, published_flops: int | None
) -> dict[str, object]:
    return {
        **counted._asdict(),
        **_percent(accuracy),
        **_milliseconds(latency),
        **({} if published_flops is None else {"flops_blog": published_flops}),
    }


def _flops_blog(cost: Cost, plan: Plan, *, edits: bool) -> int | None:
    """Return the FLOPs of one side as AIminify's blog counts them, where that differs."""
    part = plan if edits else Plan(model=plan.model, edits=())
    return flops_blog(str(plan.model.get("name")), cost, part)


def _milliseconds(latency: Latency) -> dict[str, object]:
    blocks = {name: [part.mean, part.std] for name, part in latency.blocks.items()}
    return {
        "latency_ms": latency.median,
        "latency_mean_ms": latency.mean,
        "latency_std_ms": latency.std,
        **({"blocks_ms": blocks} if blocks else {}),
    }


def _percent(accuracy: Accuracy) -> dict[str, float | None]:
    return {name: None if accuracy is None else accuracy[name] for name in ("top1", "top5")}
