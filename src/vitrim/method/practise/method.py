"""PRACTISE and MiR: whole blocks dropped, then features mimicked, with few unlabelled images.

PRACTISE (arXiv 2202.07861) drops the blocks that recover best for what they cost: the error of the
features without a block, once adaptors around it are trained end to end, over the share that it
saves. Adaptors serve that score only. MiR (arXiv 2201.02620) is the mimicking; it takes the pruned
network from any scheme, here the same score without adaptors. Both train the whole network but the
classifier on the features before pooling. With `objective` labels it is fine-tuned as a whole
instead; both papers compare with that.

Where we differ from the papers:
  * A block's share is that of the MACs, the same on every machine. The paper's is of the latency,
    measured: `saving` latency.
  * Mimicking is by AdamW; the papers use SGD. `pooled_weight` adds the error of the classifier's
    input to the loss, as in our DC-ViT, so that both are recovered alike; 0 is the papers' loss.
  * `recoverability` least_squares is a quick approximation (ours).
  * See `vitrim.method.practise.end_to_end` for the training of adaptors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from vitrim.budget.blocks import PROTECTED, Group, flatten, is_protected
from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.method import Granularity
from vitrim.method.practise.candidates import candidates_of, fewest_groups, share_of_group
from vitrim.method.practise.end_to_end import EndToEnd
from vitrim.method.practise.recoverability import Recoverability as LeastSquares
from vitrim.method.practise.settings import AdaptorTraining
from vitrim.network import structure
from vitrim.network.structure import Structure, blocks_of
from vitrim.plan import Drop, Evidence, Proposal
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Mimic, frozen_parameters
from vitrim.trainer.phase import Phase, Scorer
from vitrim.trainer.recipe import Recipe

_log = logging.getLogger(__name__)
Objective = Literal["mimic", "labels"]
Saving = Literal["macs", "latency"]
"""What the error is divided by: the share of the MACs or of the latency that is saved."""
Recoverability = Literal["end_to_end", "least_squares", "no_adaptors"]
"""What stands in for a removed block while the error without it is measured.

`end_to_end`: adaptors around it, trained on the final features; `least_squares`: a linear map in
its place, fitted to its output; `no_adaptors`: nothing.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Practise:
    """Whole blocks dropped; numbers are in conf/method/practise.yaml and mir.yaml."""

    metric: ClassVar[Metric] = "macs"
    granularity: ClassVar[Granularity] = "block"

    levels: Sequence[float]
    protected: Sequence[int] | None
    group_size: int
    recoverability: Recoverability
    adaptor_training: AdaptorTraining
    ridge: float
    saving: Saving
    latency_repeats: int
    sampling: Sampling
    objective: Objective
    pooled_weight: float
    tuning: Recipe

    def __post_init__(self) -> None:
        kinds, objectives = get_args(Recoverability), get_args(Objective)
        require(
            "method",
            self,
            (
                "protected",
                self.protected is None or is_protected(self.protected),
                f"null or {PROTECTED}",
            ),
            ("group_size", is_count(self.group_size), "a whole number from 1 on"),
            ("recoverability", self.recoverability in kinds, ", ".join(kinds)),
            ("ridge", is_positive(self.ridge), "a number above 0"),
            ("saving", self.saving in get_args(Saving), ", ".join(get_args(Saving))),
            ("latency_repeats", is_count(self.latency_repeats), "a whole number from 1 on"),
            ("objective", self.objective in objectives, ", ".join(objectives)),
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
            fewest_groups(cost, target, self._candidates(cost.structure))

    @property
    def labelled_training(self) -> tuple[Recipe, ...]:
        """The fine-tuning, if it is with labels."""
        with_labels = self.objective == "labels" and self.tuning.epochs
        return (self.tuning,) if with_labels else ()

    def scorer(self, net: nn.Module) -> Scorer:
        """Return what scores every candidate on the few images."""
        groups = self._candidates(structure(net))
        repeats = self.latency_repeats if self.saving == "latency" else 0
        if self.recoverability == "end_to_end":
            return EndToEnd(
                net,
                groups=groups,
                images=self.sampling.images,
                training=self.adaptor_training,
                latency_repeats=repeats,
            )
        return LeastSquares(
            net,
            groups=groups,
            sampling=self.sampling,
            adaptors=self.recoverability == "least_squares",
            ridge=self.ridge,
            latency_repeats=repeats,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Drop the blocks that lose least for what they cost, as many as the target needs.

        Without images, blocks are taken in network order. The diagnostics have `scores`: the errors
        over the shares that are saved, by the first block of each candidate.
        """
        errors, order = evidence.block_scores, self._candidates(cost.structure)
        savings = evidence.block_savings or {g[0]: share_of_group(cost, g) for g in order}
        scores = {group[0]: errors[group[0]] / savings[group[0]] for group in order if errors}
        if scores:
            order = sorted(order, key=lambda group: scores[group[0]])
        else:
            _log.info("no images to score blocks with: blocks are taken in network order")
        dropped = flatten(fewest_groups(cost, target, order))
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

    def _candidates(self, described: Structure) -> list[Group]:
        """Return the groups of blocks that may be dropped, in network order."""
        return candidates_of(described, protected=self.protected, group_size=self.group_size)
