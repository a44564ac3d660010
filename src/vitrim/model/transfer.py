"""A compact network taken to other data: its classifier drawn anew, everything else kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vitrim.errors import ConfigError
from vitrim.network.skeleton import skeleton
from vitrim.plan import Plan
from vitrim.store import misfits


def but_classes(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a plan says of its dense network, without the number of classes."""
    args = {name: value for name, value in model["args"].items() if name != "num_classes"}
    return {**model, "args": args}


def with_new_head(
    net: nn.Module, plan: Plan, model: Mapping[str, Any], n_classes: int, *, seed: int
) -> tuple[nn.Module, Plan]:
    """Return `net`, changed, with a classifier drawn by `seed`, and the plan from `model` to it.

    Args:
        net: the result of `plan`, in eval mode.
        plan: from a dense network that differs from `model` in its classes only.
        model: `name` and `args` of the dense network with the new classes.
        n_classes: outputs of the new classifier.
        seed: of the draw; the global generator stays as it is.

    Raises:
        ConfigError: the plan narrows what the classifier reads.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net.reset_classifier(n_classes)  # type: ignore[operator]
    steps = [*_steps(plan), {"method": "transfer"}]
    moved = replace(plan, model=model, provenance={"steps": steps})
    problems = misfits(skeleton(moved), net.state_dict())
    if problems:
        raise ConfigError(
            "transfer=true: the network to begin with was cut where its classifier reads "
            f"({'; '.join(problems[:3])}); choose a run that leaves that whole"
        )
    return net.eval(), moved


def origin(plan: Plan) -> str:
    """Return which methods made the network of `plan`, in their order.

    >>> origin(Plan(model={}, edits=(), provenance={"method": "dcvit"}))
    'of dcvit'
    """
    methods = [step.get("method", "dense") for step in _steps(plan)]
    return "of " + " and ".join(name for name in methods if name != "transfer")


def _steps(plan: Plan) -> list[Mapping[str, Any]]:
    return [dict(step) for step in plan.provenance.get("steps", [plan.provenance])]
