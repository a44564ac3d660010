"""New classifiers on compact networks, for training on other data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from vitrim.errors import ConfigError
from vitrim.network.skeleton import skeleton
from vitrim.network.surgery import method_of, steps_of
from vitrim.plan import Plan
from vitrim.store import mismatches

_TRANSFER = "transfer"


def without_classes(model: Mapping[str, object]) -> dict[str, object]:
    """Return `name` and `args` of a dense network without the number of classes."""
    args = model["args"]
    assert isinstance(args, Mapping)
    return {**model, "args": {name: args[name] for name in args if name != "num_classes"}}


def with_new_head(
    net: nn.Module, plan: Plan, model: Mapping[str, object], n_classes: int, *, seed: int
) -> tuple[nn.Module, Plan]:
    """Replace the classifier of `net`, in place, by a random one; return `net` and its new plan.

    Args:
        net: the result of `plan`, in eval mode.
        plan: from a dense network that differs from `model` in its classes only.
        model: `name` and `args` of the dense network with the new classes.
        n_classes: outputs of the new classifier.
        seed: of the random classifier; the global generator is not changed.

    Raises:
        ConfigError: the plan narrows the input of the classifier.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net.reset_classifier(n_classes)  # type: ignore[operator]
    steps: list[dict[str, object]] = [*steps_of(plan), {"method": _TRANSFER}]
    changed = replace(plan, model=model, method=method_of(steps), provenance={"steps": steps})
    problems = mismatches(skeleton(changed), net.state_dict())
    if problems:
        raise ConfigError(
            "from_run: the network was cut where its classifier reads "
            f"({'; '.join(problems[:3])}); choose a run that keeps the input of the classifier"
        )
    return net.eval(), changed


def methods_of(plan: Plan) -> str:
    """Return which methods made the network of `plan`, in order.

    >>> methods_of(Plan(model={}, edits=(), method="dcvit"))
    'of dcvit'
    """
    methods = [str(step.get("method") or "dense") for step in steps_of(plan)]
    return "of " + " and ".join(name for name in methods if name != _TRANSFER)
