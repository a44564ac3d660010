"""The callback that slices: when scoring has ended, it asks the method for the edits and cuts."""

from __future__ import annotations

import logging

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.method import Compensates, Method
from vitrim.network.computing import computing_on
from vitrim.network.int8 import int8_of
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Plan, Proposal
from vitrim.trainer.phase import Scorer, check_scorer

_log = logging.getLogger(__name__)


class Slicing(Callback):
    """Physically slice the scored network at the end of the fit.

    The result is a new network for a new Trainer: no optimiser, DDP bucket or averaged copy ever
    holds a parameter that surgery replaced.

    Args:
        method: what plans.
        cost: the closed formula of the network that is scored.
        target: what may remain.
        name: of the method, for the plan.
    """

    evidence: Evidence
    proposal: Proposal
    plan: Plan
    compact: nn.Module
    """In float, so that it can be trained; layers that the plan makes int8 are made so later."""

    def __init__(
        self,
        method: Method,
        cost: Cost,
        target: Target,
        *,
        name: str = "",
    ) -> None:
        self.method = method
        self.cost = cost
        self.target = target
        self.name = name

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan from the scorer's evidence and cut its network; compute on the Trainer's device."""
        with computing_on(trainer.strategy.root_device):
            self.apply(check_scorer(pl_module))

    def apply(self, scorer: Scorer) -> None:
        """Set `evidence`, `proposal`, `plan` and `compact` from a finished scorer."""
        self.slice(scorer.net, scorer.evidence())

    def slice(self, net: nn.Module, evidence: Evidence) -> None:
        """Set `evidence`, `proposal`, `plan` and `compact` from what was learned about `net`."""
        self.evidence = evidence
        self.proposal = self.method.plan(net, self.evidence, self.cost, self.target)
        self.plan = Plan(
            model={},
            edits=self.proposal.edits,
            method=self.name,
            provenance=self.proposal.notes,
        )
        self._log_room()
        int8_of(net, self.cost.structure, self.plan)  # refused before anything is trained
        self.compact = cut(net, self.plan.in_float())
        if isinstance(self.method, Compensates):
            values = self.method.compensation_of(net, self.compact, self.plan, self.evidence)
            with torch.no_grad():
                for name, value in values.items():
                    self.compact.get_parameter(name).copy_(value)

    def keep_all(self, net: nn.Module) -> None:
        """Set `plan` and `compact` to a copy of `net` of which nothing is removed."""
        self.plan = Plan(model={}, edits=(), method=self.name)
        self.compact = cut(net, self.plan)

    def _log_room(self) -> None:
        """Log how far below the target the plan ends (`vitrim.budget.trim` says how far it may)."""
        if self.target.is_time or self.method.granularity not in ("unit", "rank"):
            return
        metric = self.target.counted_metric
        if metric == "units":  # which are counted is known to the method alone
            return
        limit = self.cost.limit(self.target)
        remaining = self.cost.plan(self.plan).of(metric)
        _log.info(
            "target.%s=%s: %s %s remain, %s below the %s that may",
            self.target.metric,
            self.target.keep,
            f"{remaining:,}",
            self.target.unit,
            f"{limit - remaining:,}",
            f"{limit:,}",
        )
