"""What a run hands to a method: its target."""

from __future__ import annotations

from typing import Any

from vitrim.budget.target import Target, resolve_target
from vitrim.method import Method


def target_of(method: Method, strength: float | None = 3, **target: Any) -> Target:
    """Return the target of a run of `method` with this strength, or this entry of `target`."""
    return resolve_target(
        strength, target, levels=method.levels, metric=method.metric, where="a.yaml"
    )
