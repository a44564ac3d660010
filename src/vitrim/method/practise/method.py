"""PRACTISE and MiR: whole blocks dropped, then the features mimicked, with few unlabelled images.

PRACTISE (arXiv 2202.07861) drops the blocks that can be recovered best for what they cost: the
error of the features without a block, once an adaptor stands in for it, over the share of MACs that
it takes (the paper: of latency). The adaptors serve that score only. MiR (arXiv 2201.02620) is the
mimicking; it takes the pruned network from any scheme, here the same score without adaptors. Both
train the whole network but the classifier on the features before pooling; with `objective` labels,
plain fine-tuning of the whole takes its place, which both papers compare with.

The adaptor is ours, see `vitrim.method.practise.recover`; the optimiser is AdamW, the papers' SGD.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.blocks import fewest, share_of
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError, check_strength, choose
from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.method.practise.recover import Recover
from vitrim.network import structure
from vitrim.network.structure import Structure, blocks_of
from vitrim.plan import BLOCKS, Drop, Evidence, Plan
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Mimic, frozen
from vitrim.trainer.recipe import Recipe

_log = logging.getLogger(__name__)
Objective = Literal["mimic", "labels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Practise:
    """Whole blocks dropped; every number comes from conf/method/{practise,mir}.yaml."""

    name: str
    strength: float | None
    target: Mapping[str, Any]
    levels: Sequence[float]
    spare: Sequence[int]
    adaptors: bool
    ridge: float
    sampling: Sampling
    objective: Objective
    pooled: float
    tuning: Recipe

    def __post_init__(self) -> None:
        require(
            "method",
            self,
            (
                "spare",
                len(self.spare) == 2 and all(n == 0 or is_count(n) for n in self.spare),
                "two whole numbers: of first and of last blocks that stay",
            ),
            ("adaptors", isinstance(self.adaptors, bool), "true or false"),
            ("ridge", is_positive(self.ridge), "a number above 0"),
            ("objective", self.objective in get_args(Objective), ", ".join(get_args(Objective))),
            ("pooled", is_rate(self.pooled), "a number from 0 on"),
        )
        check_strength(self.strength, self.levels, where=f"conf/method/{self.name}.yaml")
        if self.budget.metric == "units":
            raise TargetError(
                "target.units: whole blocks are dropped, no units; set target.macs, target.params "
                "or target.blocks"
            )

    @property
    def budget(self) -> Target:
        """The target that is set, or the share of MACs that `strength` keeps."""
        return choose(self.strength, self.levels, self.target, metric="macs")

    def check(self, cost: Cost) -> None:
        """Raise TargetError if dropping every candidate does not meet the budget."""
        if not self.budget.is_identity:
            fewest(cost, self.budget, self._candidates(cost.structure))

    def scorer(self, net: nn.Module) -> Recover:
        """Return the two passes over the few images."""
        return Recover(
            net,
            blocks=self._candidates(structure(net)),
            sampling=self.sampling,
            adaptors=self.adaptors,
            ridge=self.ridge,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost) -> Plan:
        """Drop the blocks that lose least for what they cost, as many as the budget needs."""
        candidates = self._candidates(cost.structure)
        if BLOCKS in evidence.scores:
            errors = dict(zip(candidates, evidence.scores[BLOCKS].tolist(), strict=True))
            found = {block: errors[block] / share_of(cost, block) for block in candidates}
        else:
            _log.info("no images to judge blocks by: they are taken in the network's order")
            found = {block: float(place) for place, block in enumerate(candidates)}
        order = sorted(candidates, key=lambda block: found[block])
        dropped = fewest(cost, self.budget, order)
        branches = blocks_of(cost.structure)
        provenance = {
            "method": self.name,
            "strength": self.strength,
            "blocks": dropped,
            "scores": found if BLOCKS in evidence.scores else {},
        }
        edits = tuple(Drop(branch=name) for block in dropped for name in branches[block])
        return Plan(model={}, edits=edits, provenance=provenance)

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return nothing: adaptors are for the score."""
        return {}

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> list[LightningModule]:
        """Return the mimicking of the dense network's features, or the fine-tuning."""
        if not self.tuning.epochs:
            return []
        if self.objective == "labels":
            return [Classify(student, recipe=self.tuning, n_classes=n_classes)]
        return [
            Mimic(
                student,
                teacher,
                recipe=self.tuning,
                pooled=self.pooled,
                frozen=frozen(student, (), front=False),
            )
        ]

    def _candidates(self, described: Structure) -> list[str]:
        blocks = [*blocks_of(described)]
        return blocks[self.spare[0] : len(blocks) - self.spare[1]]
