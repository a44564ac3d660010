"""DC-ViT: dense few-shot compression (arXiv 2403.18708).

A few blocks lose their attention and most of their MLP: as few blocks as the target needs, and as
many units as it leaves. So the target is met to within one hidden unit a block, where dropping
whole blocks reaches only a handful of sizes. The blocks are those whose trial
(`vitrim.method.dcvit.trials`) leaves the network nearest to its former outputs on a set of images.
Then the network mimics the dense one's features on a few unlabelled images; the blocks after the
neighbour of the last compressed one are not trained. In Swin the paper takes successive blocks in
pairs, with plain windows and with shifted ones (`group_size: 2`): a candidate is a group, which has
one trial and is compressed in all its blocks or in none.

Convolutional networks have nothing in a block that could be reused, so there, as in the paper's
Table 4, whole blocks are dropped: those with the lowest scores relative to their share of the MACs
(ours: shares differ in these networks), and the fewest that the target needs.

The paper's: eqs. 1-6, Algorithm 1, the judging set of synthetic images (`judging_set: synthetic`),
the ablations of its Table 6 (`unit_selection` random, activation or none, `distance` mse, `mimic`
class, `freeze_tail` false, `extra_blocks`, `progressive` false). Ours: the count of MACs, which
includes the products of attention (`accounting: paper` is the paper's own), units by greedy optimal
brain surgeon, least squares before any training (`reconstruct`), and the few images themselves as
the judging set. Of trials by least squares on ViT-Ti, 500 images, the latter predict best what a
block costs: their rank correlation with the top-1 lost is 0.69, against -0.54 for 50 synthetic
images of 100 iterations, on which early blocks look worse than they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from vitrim.budget.blocks import PROTECTED, Group, flatten, is_protected, whole_blocks
from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.errors import is_count, is_rate, require
from vitrim.method import Granularity
from vitrim.method.dcvit.accounting import Accounting, compressed_widths
from vitrim.method.dcvit.candidates import (
    allowed_of,
    candidates_of,
    check_lone_blocks,
    no_candidates,
    ranked_by_cost,
)
from vitrim.method.dcvit.compression import (
    Compression,
    UnitSelection,
    edits_of,
    last_layers,
    reconstructed,
    redrawn,
)
from vitrim.method.dcvit.evaluation import Distance
from vitrim.method.dcvit.progressive import (
    Step,
    best_trial,
    compressed_blocks,
    progressive_steps,
)
from vitrim.method.dcvit.settings import DCViTRidges, DCViTTuning, Trial
from vitrim.method.dcvit.synthetic import SyntheticImages
from vitrim.method.dcvit.trials import Trials
from vitrim.network import structure
from vitrim.network.structure import Structure
from vitrim.plan import Evidence, Plan, Proposal
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import Mimic, frozen_parameters
from vitrim.trainer.phase import Phase
from vitrim.trainer.refit import Refit

JudgingImages = Literal["images", "synthetic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DCViT:
    """Attentions removed and MLPs shrunk in a few blocks; numbers are in conf/method/dcvit.yaml."""

    metric: ClassVar[Metric] = "macs"
    granularity: ClassVar[Granularity] = "unit"

    levels: Sequence[float]
    accounting: Accounting
    group_size: int
    protected: Sequence[int]
    extra_blocks: int
    allowed_blocks: Sequence[str] | None
    unit_selection: UnitSelection
    init_std: float
    reconstruct: bool
    progressive: bool
    trial: Trial
    judging_set: JudgingImages
    synthetic: SyntheticImages
    distance: Distance
    sampling: Sampling
    ridges: DCViTRidges
    tuning: DCViTTuning
    seed: int

    def __post_init__(self) -> None:
        kinds, n, blocks = get_args(UnitSelection), self.extra_blocks, self.allowed_blocks
        listed = isinstance(blocks, list | tuple) and bool(blocks)
        extra = n == 0 or (is_count(n) and self.accounting == "exact")
        require(
            "method",
            self,
            ("accounting", self.accounting in get_args(Accounting), "exact or paper"),
            ("group_size", is_count(self.group_size), "a whole number of blocks from 1 on"),
            ("protected", is_protected(self.protected), PROTECTED),
            ("extra_blocks", extra, "a whole number from 0 on; 0 with accounting=paper"),
            ("allowed_blocks", blocks is None or listed, "null or a list of blocks"),
            ("unit_selection", self.unit_selection in kinds, f"one of {', '.join(kinds)}"),
            ("init_std", is_rate(self.init_std), "a number from 0 on"),
            ("reconstruct", isinstance(self.reconstruct, bool), "true or false"),
            ("progressive", isinstance(self.progressive, bool), "true or false"),
            ("judging_set", self.judging_set in get_args(JudgingImages), "images or synthetic"),
            ("distance", self.distance in get_args(Distance), "kl or mse"),
        )

    def check(self, cost: Cost, target: Target) -> None:
        """Raise a VitrimError if the candidates alone cannot meet the target."""
        if target.metric == "units":
            raise TargetError(
                "target.units: attentions are removed, which are not counted in units here; set "
                "target.macs, target.params or target.blocks"
            )
        if self.accounting == "paper" and target.metric == "params":
            raise TargetError(
                "target.params: method.accounting=paper counts MACs; set target.macs or "
                "target.blocks, or method.accounting=exact"
            )
        if not target.is_identity:
            self._widths(cost, target, self._allowed(cost.structure))

    def scorer(self, net: nn.Module) -> Trials:
        """Return the pass over the few images, and the trials."""
        return Trials(
            net,
            groups=self._candidates(structure(net)),
            sampling=self.sampling,
            compression=Compression(
                width=self.trial.width,
                unit_selection=self.unit_selection,
                order_ridge=self.ridges.order,
                reconstruct=self.reconstruct,
                fold_ridge=self.ridges.fold,
                seed=self.seed,
            ),
            recipe=self.trial.training,
            freeze_tail=self.tuning.freeze_tail,
            synthetic=self.synthetic if self.judging_set == "synthetic" else None,
            distance=self.distance,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Compress the candidates with the lowest scores, as many as the target needs.

        Without images, candidates are taken in network order. The diagnostics have `trials`, the
        scores, by the first block of each candidate.
        """
        order = ranked_by_cost(cost, self._allowed(cost.structure), evidence.block_scores)
        widths, removed = self._widths(cost, target, order)
        return Proposal(
            edits=edits_of(cost.structure, widths, removed, evidence.scores),
            notes={
                "accounting": self.accounting,
                "blocks": list(widths or removed),
                "widths": list(widths.values()),
            },
            diagnostics={"trials": dict(evidence.block_scores)} if evidence.block_scores else {},
        )

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return last layers that add what the whole blocks added, or MLPs that are redrawn."""
        if not evidence.moments:
            return {}
        if self.unit_selection == "none":
            return redrawn(compact, plan, std=self.init_std, seed=self.seed)
        if not self.reconstruct:
            return {}
        described = structure(net)
        candidates = flatten(self._candidates(described))
        ends = {b: end for b, end in last_layers(described).items() if b in candidates}
        return reconstructed(compact, plan, evidence, ends, self.ridges.fold)

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> Iterator[Phase]:
        """Yield regression and mimicking, group by group if `progressive`, else once for all.

        Between the phases of progressive compression the network has the groups so far; the other
        blocks are the dense network's own until it is their turn.
        """
        scores = evidence.block_scores
        candidates = [  # an earlier run may have compressed blocks: these have no scores
            group for group in self._candidates(structure(teacher)) if group[0] in scores
        ]
        ranked = sorted(candidates, key=lambda group: scores[group[0]])
        groups = compressed_blocks(student, teacher, ranked)
        trial: nn.Module | None = None
        if self.progressive:
            trial = best_trial(teacher, evidence, candidates, self.trial.width)
        else:
            groups = [tuple(flatten(groups))]
        for step in progressive_steps(student, teacher, groups, trial):
            yield from self._phases(student, teacher, evidence, step)

    def _phases(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, step: Step
    ) -> Iterator[Phase]:
        """Yield the phases of one step of the recovery."""
        if step.trained:  # a phase without training, so that the result of the trial is evaluated
            yield Mimic(student, teacher, recipe=replace(self.tuning.training, epochs=0))
            return
        branches = whole_blocks(structure(teacher))
        if self.reconstruct and self.unit_selection != "none" and branches:
            yield Refit(
                student,
                evidence=evidence,
                sampling=self.sampling,
                ridge=self.ridges.fold,
                closing_ridge=self.ridges.closing,
                branches=[branches[block][1] for block in step.blocks],
            )
        if self.tuning.training.epochs:
            all_tokens = self.tuning.mimic == "all"
            yield Mimic(
                student,
                teacher,
                recipe=self.tuning.training,
                token_weight=1.0 if all_tokens else 0.0,
                pooled_weight=self.tuning.pooled_weight if all_tokens else 1.0,
                frozen=frozen_parameters(
                    student, step.compressed, freeze_tail=self.tuning.freeze_tail, dense=teacher
                ),
            )

    def _candidates(self, described: Structure) -> list[Group]:
        return candidates_of(described, protected=self.protected, group_size=self.group_size)

    def _allowed(self, described: Structure) -> list[Group]:
        """Return the candidates that may be chosen.

        Raises:
            ConfigError: there are none, or a setting does not fit the network.
        """
        check_lone_blocks(
            described,
            accounting=(self.accounting, "exact"),
            group_size=(self.group_size, 1),
            extra_blocks=(self.extra_blocks, 0),
        )
        candidates = self._candidates(described)
        if not candidates:
            raise no_candidates(self.protected, self.group_size)
        return allowed_of(candidates, self.allowed_blocks)

    def _widths(
        self, cost: Cost, target: Target, order: Sequence[Group]
    ) -> tuple[dict[str, int], list[str]]:
        return compressed_widths(
            cost, target, order, accounting=self.accounting, extra_blocks=self.extra_blocks
        )
