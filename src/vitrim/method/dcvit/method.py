"""DC-ViT: dense few-shot compression (arXiv 2403.18708).

A few blocks lose their attention and most of their MLP: as few blocks as the target needs, and as
many units as it leaves. So the target is met to within one hidden unit a block, where dropping
whole blocks reaches only a handful of sizes. The blocks are those whose trial
(`vitrim.method.dcvit.trials`) leaves the network nearest to its former outputs on a set of images.
Then the network mimics the dense one's features on a few unlabelled images; the blocks after the
neighbour of the last compressed one are not trained. In Swin the paper removes successive blocks in
pairs, with plain windows and with shifted ones (`group_size: 2`), and their MLPs with them
(`drop_mlps`): a candidate is a group, which has one trial and is compressed in all its blocks or in
none. Pairs whose MLPs are shrunk instead are ours.

Convolutional networks have nothing in a block that could be reused, so there, as in the paper's
Table 4, whole blocks are dropped: those with the lowest scores relative to their share of the MACs
(ours: shares differ in these networks), and the fewest that the target needs.

The paper's: eqs. 1-6, Algorithm 1, the judging set of synthetic images (`judging_set: synthetic`),
trials of the target's width (`trial.width: null`) on augmented images (`trial.views: augmented`),
the ablations of its Table 6 (`unit_selection` random, activation or none, `distance` mse, `mimic`
class, `freeze_tail` false, `extra_blocks`, `progressive` false). Ours: the count of MACs, which
includes the products of attention (`accounting: paper` is the paper's own), units by greedy optimal
brain surgeon, least squares before any training (`reconstruct`), trials of one width for all
targets, on plain images in one order, and the few images themselves as the judging set. Of trials
by least squares on ViT-Ti, 500 images, the latter predict best what a block costs: their rank
correlation with the top-1 lost is 0.69, against -0.54 for 50 synthetic images of 100 iterations, on
which early blocks look worse than they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from vitrim.budget.blocks import PROTECTED, Group, flatten, is_protected, whole_blocks
from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.errors import ConfigError, is_count, is_rate, require
from vitrim.method import Granularity
from vitrim.method.dcvit.accounting import Accounting, Budget, Shape
from vitrim.method.dcvit.candidates import (
    allowed_of,
    candidates_of,
    check_lone_blocks,
    no_candidates,
    ranked_by_cost,
)
from vitrim.method.dcvit.compression import (
    Compression,
    TrialWidth,
    UnitSelection,
    edits_of,
    last_layers,
    reconstructed,
    redrawn,
    shape_of_trial,
)
from vitrim.method.dcvit.evaluation import Distance
from vitrim.method.dcvit.progressive import compressed_blocks, phases_of_recovery
from vitrim.method.dcvit.settings import DCViTRidges, DCViTTuning, Trial
from vitrim.method.dcvit.synthetic import SyntheticImages
from vitrim.method.dcvit.trial_training import TrialRecipe
from vitrim.method.dcvit.trials import Trials
from vitrim.network import structure
from vitrim.network.structure import Structure
from vitrim.plan import Evidence, Plan, Proposal
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import FeatureLoss
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
    drop_mlps: bool
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
    fine_tune: bool
    tuning: DCViTTuning
    seed: int

    def __post_init__(self) -> None:
        kinds, n, blocks = get_args(UnitSelection), self.extra_blocks, self.allowed_blocks
        listed = isinstance(blocks, list | tuple) and bool(blocks)
        extra = n == 0 or (is_count(n) and not self.drop_mlps)
        solved = self.reconstruct is False or (
            self.reconstruct is True and not self.drop_mlps and self.unit_selection != "none"
        )
        require(
            "method",
            self,
            ("accounting", self.accounting in get_args(Accounting), "exact or paper"),
            ("group_size", is_count(self.group_size), "a whole number of blocks from 1 on"),
            ("protected", is_protected(self.protected), PROTECTED),
            ("drop_mlps", isinstance(self.drop_mlps, bool), "true or false"),
            ("extra_blocks", extra, "a whole number from 0 on; 0 with drop_mlps=true"),
            ("allowed_blocks", blocks is None or listed, "null or a list of blocks"),
            ("unit_selection", self.unit_selection in kinds, f"one of {', '.join(kinds)}"),
            ("init_std", is_rate(self.init_std), "a number from 0 on"),
            (
                "reconstruct",
                solved,
                "true or false; false with unit_selection=none or drop_mlps=true, where no last "
                "layer can be solved",
            ),
            ("progressive", isinstance(self.progressive, bool), "true or false"),
            ("judging_set", self.judging_set in get_args(JudgingImages), "images or synthetic"),
            ("distance", self.distance in get_args(Distance), "kl or mse"),
            ("fine_tune", isinstance(self.fine_tune, bool), "true or false"),
        )

    def check(self, cost: Cost, target: Target) -> None:
        """Raise a VitrimError if the candidates alone cannot meet the target."""
        if target.metric == "units":
            raise TargetError(
                "target.units: attentions are removed, which are not counted in units here; set "
                "target.macs, target.params or target.blocks"
            )
        if self.accounting == "paper" and target.metric in ("params", "size_mb"):
            raise TargetError(
                f"target.{target.metric}: method.accounting=paper counts MACs; set target.macs or "
                "target.blocks, or method.accounting=exact"
            )
        if not target.is_identity:
            self._budget.shape(cost, target, self._allowed(cost.structure))

    @property
    def revision(self) -> int:
        """2 where trials differ from 0.1.0's: in redrawn MLPs, the loss, or synthetic images."""
        trained = self.trial.training.epochs > 0 and self.tuning.loss != FeatureLoss()
        seeded = self.judging_set == "synthetic" and self.seed != 0
        return 2 if trained or seeded or self.unit_selection == "none" else 1

    def scorer(self, net: nn.Module) -> Trials:
        """Return the pass over the few images, and the trials, of a width that is set."""
        if self.trial.width is None:
            raise ConfigError("method.trial.width=null: the width follows from a target")
        return _trials(self, net, self._candidates(structure(net)), self.trial.width)

    def scorer_for(self, net: nn.Module, cost: Cost, target: Target) -> Trials:
        """Return the pass over the few images, and the trials, also those of the target's width."""
        width = self._trial_width(cost, target)
        return _trials(self, net, self._candidates(structure(net)), width)

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Compress the candidates with the lowest scores, as many as the target needs.

        Without images, candidates are taken in network order. The diagnostics have `trials`, the
        scores, by the first block of each candidate. If trials were trained, the notes say which
        one is the first step of the recovery: `reused_trial`, null where none has its shape.
        """
        described, scores = cost.structure, evidence.block_scores
        order = ranked_by_cost(cost, self._allowed(described), scores)
        shape = self._budget.shape(cost, target, order)
        notes: dict[str, object] = {
            "accounting": self.accounting,
            "blocks": shape.blocks,
            "widths": list(shape.widths.values()),
        }
        if evidence.best_trial is not None:
            best = evidence.best_trial[0]
            tried = next(group for group in self._candidates(described) if group[0] == best)
            width = self._trial_width(cost, target)
            fits = shape.of(tried) == shape_of_trial(described, tried, width)
            notes["reused_trial"] = best if self.progressive and fits else None
        return Proposal(
            edits=edits_of(described, shape, evidence.scores),
            notes=notes,
            diagnostics={"trials": dict(scores)} if scores else {},
        )

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return last layers that add what the whole blocks added, or MLPs that are redrawn."""
        if not evidence.block_scores:
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
        """Yield regression and mimicking, group by group if `progressive`, else once for all."""
        scores, described = evidence.block_scores, structure(teacher)
        candidates = [  # an earlier run may have compressed blocks: these have no scores
            group for group in self._candidates(described) if group[0] in scores
        ]
        ranked = sorted(candidates, key=lambda group: scores[group[0]])
        groups = compressed_blocks(student, teacher, ranked)
        branches = whole_blocks(described)

        def refit(blocks: Group) -> Refit:
            return Refit(
                student,
                teacher,
                sampling=_sampling(self),
                ridge=self.ridges.fold,
                closing_ridge=self.ridges.closing,
                branches=[branches[block][1] for block in blocks],
            )

        yield from phases_of_recovery(
            student,
            teacher,
            groups if self.progressive else [tuple(flatten(groups))],
            evidence.best_trial if self.progressive else None,
            tuning=self.tuning,
            refit=refit if self.reconstruct and branches else None,
            recovery_images=self.sampling.images if self.fine_tune else None,
        )

    @property
    def _budget(self) -> Budget:
        return Budget(
            accounting=self.accounting, extra_blocks=self.extra_blocks, drop_mlps=self.drop_mlps
        )

    def _trial_width(self, cost: Cost, target: Target) -> TrialWidth:
        """Return the share of units that trials keep, or what each candidate becomes in its own."""
        candidates = self._candidates(cost.structure)
        if self.drop_mlps or not whole_blocks(cost.structure):
            return {group[0]: Shape({}, [*group]) for group in candidates}
        if self.trial.width is not None:
            return self.trial.width
        return self._budget.shapes_of_trials(cost, target, candidates)

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
            drop_mlps=(self.drop_mlps, False),
        )
        candidates = self._candidates(described)
        if not candidates:
            raise no_candidates(self.protected, self.group_size)
        return allowed_of(candidates, self.allowed_blocks)


def _trials(method: DCViT, net: nn.Module, groups: Sequence[Group], width: TrialWidth) -> Trials:
    """Return the scorer of a method."""
    tuning, trial = method.tuning, method.trial
    return Trials(
        net,
        groups=groups,
        sampling=_sampling(method),
        compression=Compression(
            width=width,
            unit_selection=method.unit_selection,
            order_ridge=method.ridges.order,
            reconstruct=method.reconstruct,
            fold_ridge=method.ridges.fold,
            init_std=method.init_std,
            seed=method.seed,
        ),
        recipe=TrialRecipe(
            training=trial.training,
            views=trial.views,
            loss=tuning.loss,
            freeze_tail=tuning.freeze_tail,
        ),
        synthetic=method.synthetic if method.judging_set == "synthetic" else None,
        distance=method.distance,
    )


def _sampling(method: DCViT) -> Sampling:
    """Return the sampling of a method, without the images that a recovery holds out."""
    sampling = method.sampling
    return method.tuning.recovery.calibration(sampling) if method.fine_tune else sampling
