"""What a compression method is: scorer, plan, compensation, recovery. Types only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from lightning import LightningModule
from torch import Tensor, nn

from vitrim.plan import Evidence, Plan
from vitrim.target import Cost, Target


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


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of numbers with four functions; its yaml's `_target_` is its address."""

    @property
    def budget(self) -> Target:
        """What may remain: the target that is set, or the strength's; a share of 1 is identity."""
        ...

    def check(self, cost: Cost) -> None:
        """Raise a VitrimError, before any training, if the budget cannot be reached."""
        ...

    def scorer(self, net: nn.Module) -> Scorer:
        """Return the phase that scores `net`, which it may train."""
        ...

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost) -> Plan:
        """Choose the edits: pure, on CPU, deterministic, within the target."""
        ...

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return new values, by name, for parameters of `compact`, the cut of `net`; or none.

        Pure: what makes up in closed form for what was cut, from what the scorer saw.
        """
        ...

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> Iterable[LightningModule]:
        """Return the phases that follow on the compact net, in order, each with `epochs`.

        A generator may change the net between them.
        """
        ...
