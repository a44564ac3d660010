"""The numbers of report.json: the dense network, the compact one, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vitrim.deploy.runfolder import FORMAT
from vitrim.paper import flops_blog
from vitrim.paper.counts import paper_flops
from vitrim.plan import Plan

if TYPE_CHECKING:
    from vitrim.budget.cost import Cost
    from vitrim.budget.target import Target
    from vitrim.measure import Count, Latency

Accuracy = Mapping[str, float] | None
"""Percent by name (top1, top5) and the number of `images`; None where there were no images."""


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
    nothing = Plan(model=plan.model, edits=())
    bytes_of = [cost.plan(edits).size_bytes for edits in (nothing, plan)]
    dense = _side(dense_count, dense_accuracy, times[0], _as_published(cost, nothing))
    compact = _side(compact_count, final, times[1], _as_published(cost, plan))
    for side, nbytes in zip((dense, compact), bytes_of, strict=True):
        side["mb"] = nbytes / 1e6
    return {
        "format": FORMAT,
        "dense": dense,
        "compact": compact,
        "cut": _percent(stages["cut"]),
        "stages": {name: _percent(accuracy) for name, accuracy in stages.items()},
        "evaluated_images": None if final is None else final.get("images"),
        "target": {"metric": target.metric, "keep": target.keep},
        "kept": {
            "params": compact_count.params / dense_count.params,
            "macs": compact_count.macs / dense_count.macs,
            "mb": bytes_of[1] / bytes_of[0],
        },
    }


def _side(
    counted: Count, accuracy: Accuracy, latency: Latency, published: Mapping[str, object]
) -> dict[str, object]:
    return {**counted._asdict(), **_percent(accuracy), **_milliseconds(latency), **published}


def _as_published(cost: Cost, plan: Plan) -> dict[str, object]:
    """Return the FLOPs of one side as every paper counts them, and AIminify's where they differ."""
    name = str(plan.model.get("name"))
    blog = flops_blog(name, cost, plan)
    counts: dict[str, object] = {"paper_flops": paper_flops(name, cost, plan)}
    return counts if blog is None else {**counts, "flops_blog": blog}


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
