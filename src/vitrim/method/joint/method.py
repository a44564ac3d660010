"""Joint loss-aware compression: every edit on one scale, predicted loss, and one budget over all.

Hidden units of MLPs, directions of queries and keys, directions of values, heads, ranks of layers,
whole branches and int8 weights all cost KL divergence from the dense network's decision. One pass
forward and back over unlabelled images predicts these losses (`vitrim.sensitivity.curvature`), a
few short passes measure some of them, and predictions are scaled to what was measured
(`vitrim.sensitivity.predict`). What loses least for what it saves goes
(`vitrim.method.joint.paths`), until every budget is met. Then each MLP is trained by itself on the
compact network's own stream (`vitrim.method.joint.reconstruct`). Ours. In the
closed form it builds on optimal brain surgeon (Hassibi and Stork 1993), on K-FAC's factors of the
Gauss-Newton matrix (Martens and Grosse, arXiv 1503.05671), and on OB2C (arXiv 2608.17657).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.errors import is_count, is_positive, require
from vitrim.method import Granularity
from vitrim.method.joint.allocation import Allocated, Limits, Losses, UnreachableError, allocate
from vitrim.method.joint.budgets import Budgets
from vitrim.method.joint.evidence import compensated, equal_losses, factors, losses_of
from vitrim.method.joint.reconstruct import Reconstruct
from vitrim.method.joint.settings import EDITS, JointRidges, JointTuning, LocalTraining
from vitrim.network import stepwise, structure
from vitrim.network.dispatch import UnsupportedArchitecture
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Int8, Plan, Proposal
from vitrim.sensitivity.parts import KINDS, parts_of
from vitrim.sensitivity.results import probe_table
from vitrim.sensitivity.scorer import LossScorer
from vitrim.sensitivity.settings import Scaling
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.phase import Phase
from vitrim.trainer.recovery import Recovery

_TRIES = 8  # of an allocation whose latency does not add up


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint:
    """Edits and how they are found; every number comes from conf/method/joint.yaml."""

    levels: Sequence[float]
    edits: Sequence[str]
    temperature: float
    max_rank_fraction: float
    round_to: int
    even_heads: bool
    sampling: Sampling
    ridges: JointRidges
    scaling: Scaling
    regression: bool
    closing: bool
    local: LocalTraining
    fine_tune: bool
    tuning: JointTuning
    metric: ClassVar[Metric] = "macs"
    granularity: ClassVar[Granularity] = "unit"
    several_budgets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        fraction = self.max_rank_fraction
        known = bool(self.edits) and {*self.edits} <= {*EDITS}
        alone = "heads" not in self.edits or "v" in self.edits
        require(
            "method",
            self,
            ("edits", known, f"a list of {', '.join(EDITS)}"),
            ("edits", alone, "v as well where heads may go: heads cost what their values cost"),
            ("temperature", is_positive(self.temperature), "a number above 0"),
            ("max_rank_fraction", is_positive(fraction) and fraction <= 1, "a number in 0..1"),
            ("round_to", is_count(self.round_to), "a whole number from 1 on"),
            ("even_heads", isinstance(self.even_heads, bool), "true or false"),
            ("regression", isinstance(self.regression, bool), "true or false"),
            ("closing", isinstance(self.closing, bool), "true or false"),
            ("fine_tune", isinstance(self.fine_tune, bool), "true or false"),
        )
        self.scaling.check("method.scaling")

    def check(self, cost: Cost, target: Target) -> None:
        """Raise TargetError if the edits cannot meet the target, or nothing can go."""
        losses = equal_losses(cost, self.edits)
        if not (losses.units or losses.components or losses.branches or losses.int8):
            kinds = {site.kind for site in cost.structure.sites.values() if not site.locked_reason}
            available = [edit for kind, edit in KINDS.items() if kind in kinds]
            raise TargetError(
                f"method.edits={[*self.edits]}: this network has none of these; it has "
                f"{', '.join(available) or 'nothing that joint compression can cut'}"
            )
        self._allocate(self._budgets(cost, target, losses), losses)

    def scorer(self, net: nn.Module) -> LossScorer:
        """Return the pass over calibration images, whose result serves all budgets."""
        return LossScorer(
            net,
            kinds=[*self.edits],
            sampling=self._calibration(),
            temperature=self.temperature,
            ridges=self.ridges.of_losses,
            scaling=self.scaling,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Remove what is predicted to lose least for what it saves."""
        parts = parts_of(net, self.edits)
        losses = losses_of(parts, evidence) if evidence.moments else equal_losses(cost, self.edits)
        budgets = self._budgets(cost, target, losses)
        allocated = self._allocate(budgets, losses)
        notes: dict[str, object] = {"edits": [*self.edits], "predicted_kl": allocated.loss}
        if len(budgets.limits) > 1:
            notes["binding"] = budgets.binding(allocated.remaining)
        table = evidence.moments.get("network", {}).get("probes")
        measured = probe_table(parts, table) if table is not None and len(table) else []
        return Proposal(
            edits=allocated.edits,
            notes=notes,
            diagnostics={"losses": measured} if measured else {},
        )

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the weights of the cut of the network in its directions, units folded."""
        if not evidence.moments:
            return {}
        twin = compensated(net, structure(net), plan, evidence, self.ridges.fold)
        in_float = tuple(edit for edit in plan.edits if not isinstance(edit, Int8))
        values = dict(cut(twin, Plan(model={}, edits=in_float)).named_parameters())
        return {**values, **factors(net, plan, evidence, self.ridges.metric)}

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> Iterator[Phase]:
        """Yield what is done MLP by MLP, and the training of the whole network."""
        if (self.regression or self.closing or self.local.epochs) and _has_stream(student):
            yield Reconstruct(
                student,
                teacher,
                sampling=self._calibration(),
                ridge=self.ridges.regression if self.regression else None,
                closing_ridge=self.ridges.closing if self.closing else None,
                local=self.local,
            )
        if self.fine_tune:
            images = self.sampling.images
            yield Recovery(student, teacher, settings=self.tuning.recovery, images=images)

    def _calibration(self) -> Sampling:
        """Return the sampling, without the images that the training holds out."""
        return self.tuning.recovery.calibration(self.sampling) if self.fine_tune else self.sampling

    def _budgets(self, cost: Cost, target: Target, losses: Losses) -> Budgets:
        return Budgets(cost, target, [*losses.units], even_heads=self.even_heads)

    def _allocate(self, budgets: Budgets, losses: Losses) -> Allocated:
        cost, target = budgets.cost, budgets.targets[0]
        how = Limits(
            round_to=self.round_to,
            even_heads=self.even_heads,
            heads="heads" in self.edits,
            max_rank_fraction=self.max_rank_fraction,
        )
        limits = budgets.limits
        for _ in range(_TRIES):
            try:
                found = allocate(cost.structure, losses, budgets, limits, how)
            except UnreachableError as error:
                raise budgets.unreachable(error.least) from None
            excess = budgets.of_edits(found.edits) - budgets.limits
            if (excess <= 1e-9 * budgets.limits).all():
                return found
            limits = limits - 1.1 * excess.clip(min=0.0)  # latencies do not add up exactly
        raise TargetError(f"target.{target.metric}={target.keep}: no plan meets it")


def _has_stream(net: nn.Module) -> bool:
    try:
        return stepwise(net).norm_is_features
    except UnsupportedArchitecture:
        return False
