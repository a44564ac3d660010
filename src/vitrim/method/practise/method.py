"""PRACTISE and MiR: whole blocks dropped, then features mimicked, with few unlabelled images.

PRACTISE (arXiv 2202.07861) drops the blocks that recover best for what they cost: the error of the
features without a block, once an adaptor replaces it, over its share of the MACs (the paper: of
latency). Adaptors serve that score only. MiR (arXiv 2201.02620) is the mimicking; it takes the
pruned network from any scheme, here the same score without adaptors. Both train the whole network
but the classifier on the features before pooling. With `objective` labels it is fine-tuned as a
whole instead; both papers compare with that.

The adaptor is ours, see `vitrim.method.practise.recoverability`; the optimiser is AdamW, the
papers' is SGD.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from vitrim.budget.blocks import PROTECTED, fewest, is_protected, share_of
from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.errors import is_positive, is_rate, require
from vitrim.method import Granularity
from vitrim.method.practise.recoverability import Recoverability
from vitrim.network import structure
from vitrim.network.structure import Structure, blocks_of
from vitrim.plan import Drop, Evidence, Proposal
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Mimic, frozen_parameters
from vitrim.trainer.phase import Phase
from vitrim.trainer.recipe import Recipe

_log = logging.getLogger(__name__)
_HINT = "protect fewer blocks (method.protected)"
Objective = Literal["mimic", "labels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Practise:
    """Whole blocks dropped; numbers are in conf/method/practise.yaml and mir.yaml."""

    metric: ClassVar[Metric] = "macs"
    granularity: ClassVar[Granularity] = "block"

    levels: Sequence[float]
    protected: Sequence[int]
    adaptors: bool
    ridge: float
    sampling: Sampling
    objective: Objective
    pooled_weight: float
    tuning: Recipe

    def __post_init__(self) -> None:
        require(
            "method",
            self,
            ("protected", is_protected(self.protected), PROTECTED),
            ("adaptors", isinstance(self.adaptors, bool), "true or false"),
            ("ridge", is_positive(self.ridge), "a number above 0"),
            ("objective", self.objective in get_args(Objective), ", ".join(get_args(Objective))),
            ("pooled_weight", is_rate(self.pooled_weight), "a number from 0 on"),
        )

    def check(self, cost: Cost, target: Target) -> None:
        """Raise TargetError if dropping every candidate does not meet the target."""
        if target.metric == "units":
            raise TargetError(
                "target.units: whole blocks are dropped, no units; set target.macs, target.params "
                "or target.blocks"
            )
        if not target.is_identity:
            fewest(cost, target, self._candidates(cost.structure), hint=_HINT)

    def scorer(self, net: nn.Module) -> Recoverability:
        """Return the two passes over the few images."""
        return Recoverability(
            net,
            blocks=self._candidates(structure(net)),
            sampling=self.sampling,
            adaptors=self.adaptors,
            ridge=self.ridge,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Drop the blocks that lose least for what they cost, as many as the target needs.

        Without images, blocks are taken in network order. The diagnostics have `scores`: the errors
        over the shares of MACs, by block.
        """
        errors, order = evidence.block_scores, self._candidates(cost.structure)
        scores = {block: errors[block] / share_of(cost, block) for block in order if errors}
        if scores:
            order = sorted(order, key=lambda block: scores[block])
        else:
            _log.info("no images to score blocks with: blocks are taken in network order")
        dropped = fewest(cost, target, order, hint=_HINT)
        branches = blocks_of(cost.structure)
        return Proposal(
            edits=tuple(Drop(branch=name) for block in dropped for name in branches[block]),
            notes={"blocks": dropped},
            diagnostics={"scores": scores} if scores else {},
        )

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> list[Phase]:
        """Return the mimicking of the dense network's features, or the fine-tuning."""
        if not self.tuning.epochs:
            return []
        if self.objective == "labels":
            return [Classify(student, recipe=self.tuning, n_classes=n_classes)]
        frozen = frozen_parameters(student, (), freeze_tail=False)
        return [
            Mimic(
                student,
                teacher,
                recipe=self.tuning,
                pooled_weight=self.pooled_weight,
                frozen=frozen,
            )
        ]

    def _candidates(self, described: Structure) -> list[str]:
        """Return the blocks that may be dropped, in network order."""
        blocks = [*blocks_of(described)]
        return blocks[self.protected[0] : len(blocks) - self.protected[1]]
