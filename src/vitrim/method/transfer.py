"""Transfer: train a network on other data with labels, and remove nothing.

The network to start from is usually a compact one with a new classifier (`vitrim.model.transfer`);
it is trained as a whole (DC-ViT, arXiv 2403.18708, table 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target
from vitrim.errors import ConfigError
from vitrim.method import Granularity
from vitrim.plan import Evidence, Proposal
from vitrim.trainer.classify import Classify
from vitrim.trainer.phase import Phase, Scorer
from vitrim.trainer.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """Supervised training of the whole network, by `training` (conf/method/transfer.yaml)."""

    training: Recipe
    levels: ClassVar[tuple[float, ...]] = (1.0,)
    metric: ClassVar[Metric] = "units"
    granularity: ClassVar[Granularity] = "none"

    def check(self, cost: Cost, target: Target) -> None:
        """Accept every network: nothing is removed."""

    def scorer(self, net: nn.Module) -> Scorer:
        """Refuse to score: a target that removes nothing needs no evidence.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("method=transfer removes nothing, so it scores nothing: set strength=0")

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Return no edits."""
        return Proposal(edits=())

    @property
    def labelled_training(self) -> tuple[Recipe, ...]:
        """The training of the network."""
        return (self.training,)

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> list[Phase]:
        """Return the training."""
        return [Classify(student, recipe=self.training, n_classes=n_classes)]
