"""The protocol of a phase that scores a network."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn

from vitrim.plan import Evidence


@runtime_checkable
class Scorer(Protocol):
    """A LightningModule that learns what matters in `net`.

    `settings` identifies its result: a finished scorer is reused by every run with equal settings,
    so nothing that only matters for the plan (strength, target) belongs there.
    """

    net: nn.Module
    epochs: int
    settings: dict[str, Any]

    def evidence(self) -> Evidence:
        """Return what was learned and leave `net` plain, ready to be cut; safe to call twice."""
        ...
