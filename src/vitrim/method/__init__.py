"""What a compression method is: scorer, plan, compensation, recovery. Types only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.plan import Evidence, Plan
from vitrim.trainer.phase import Scorer


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
