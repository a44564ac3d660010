"""The callback that slices: when scoring has ended, it asks the method for the plan and cuts."""

from __future__ import annotations

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from vitrim.budget.cost import Cost
from vitrim.method import Method
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Plan
from vitrim.trainer.phase import Scorer


class Prune(Callback):
    """Physically slice the scored network at the end of the fit.

    The result is a new network for a new Trainer: no optimiser, DDP bucket or averaged copy ever
    holds a parameter that surgery replaced.
    """

    evidence: Evidence
    plan: Plan
    compact: nn.Module

    def __init__(self, method: Method, cost: Cost) -> None:
        self.method = method
        self.cost = cost

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan from the scorer's evidence and cut its network."""
        assert isinstance(pl_module, Scorer)
        self.apply(pl_module)

    def apply(self, scorer: Scorer) -> None:
        """Set `evidence`, `plan` and `compact` from a finished scorer."""
        self.evidence = scorer.evidence()
        self.plan = self.method.plan(scorer.net, self.evidence, self.cost)
        self.compact = cut(scorer.net, self.plan)
        values = self.method.compensation_of(scorer.net, self.compact, self.plan, self.evidence)
        with torch.no_grad():
            for name, value in values.items():
                self.compact.get_parameter(name).copy_(value)
