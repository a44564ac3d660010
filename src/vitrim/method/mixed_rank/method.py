"""Activation-aware mixed-rank compression: Linear layers in two factors, each of its own rank.

After "Memory-Efficient Vision Transformers: An Activation-Aware Mixed-Rank Compression Strategy"
(arXiv 2402.06004). From the paper: decompositions by the normalised output error, or by a mean
input; greedy ranks by energy per weight, up to the break-even rank; a residual of its own rank,
trained by the gradient of each layer's output error and merged by concatenation; then training of
the uncompressed parameters. Its full text was not at hand: these are reconstructions from its
abstract and from accounts of it, and no number in conf/method/mixed_rank.yaml is the paper's but
the -60 % of strength 5. The defaults are ours; conf/experiment/mixed_rank/deit_base_paper.yaml
has the paper's choices, `max_rank_fraction` of 1 among them.

Ours: the decomposition and the allocation by loss (`vitrim.network.decompose`) and that by
predicted KL divergence (`vitrim.method.mixed_rank.by_kl`), along the hulls of error curves
(`vitrim.method.mixed_rank.ranks`), and the sequential regression
(`vitrim.method.mixed_rank.regress`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.errors import is_count, is_positive, require
from vitrim.method import Granularity
from vitrim.method.mixed_rank.allocation import ranks_within
from vitrim.method.mixed_rank.by_kl import check_linear, loss_scorer, losses_of, proposal_of
from vitrim.method.mixed_rank.metric import (
    CENTRED,
    DECOMPOSITIONS,
    Decomposition,
    component_losses,
    input_gram,
    rank_curves,
    spectrum_of,
)
from vitrim.method.mixed_rank.pieces import Piece, pieces_of, statistics_of
from vitrim.method.mixed_rank.profile import Profile
from vitrim.method.mixed_rank.regress import Regress
from vitrim.method.mixed_rank.residual import Residual
from vitrim.method.mixed_rank.settings import (
    LAYERS,
    MixedRankRidges,
    MixedRankTuning,
    QkvFactors,
    RankLosses,
    ResidualSettings,
    Rule,
)
from vitrim.network import structure
from vitrim.network.decompose import Spectrum, lost_output
from vitrim.network.factored import LowRankLinear
from vitrim.network.structure import Structure
from vitrim.plan import Evidence, LowRank, Plan, Proposal
from vitrim.sensitivity.scorer import LossScorer
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import Mimic
from vitrim.trainer.phase import AllButHeldOut, Phase
from vitrim.trainer.recovery import Recovery

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedRank:
    """Metrics, allocations and recoveries; every number comes from conf/method/mixed_rank.yaml."""

    levels: Sequence[float]
    layers: Sequence[str]
    qkv: QkvFactors
    decomposition: Decomposition
    allocation: Rule
    losses: RankLosses
    error_exponent: float
    max_rank_fraction: float
    ridges: MixedRankRidges
    sampling: Sampling
    gradient_images: int
    regression: bool
    residual: ResidualSettings
    fine_tune: bool
    tuning: MixedRankTuning
    curves: bool
    metric: ClassVar[Metric] = "params"
    granularity: ClassVar[Granularity] = "rank"

    def __post_init__(self) -> None:
        is_fraction = is_positive(self.max_rank_fraction) and self.max_rank_fraction <= 1
        require(
            "method",
            self,
            (
                "layers",
                bool(self.layers) and set(self.layers) <= {*LAYERS},
                f"a list of {', '.join(LAYERS)}",
            ),
            ("qkv", self.qkv in get_args(QkvFactors), "fused or separate"),
            (
                "decomposition",
                self.decomposition in DECOMPOSITIONS,
                f"one of {', '.join(DECOMPOSITIONS)}",
            ),
            (
                "allocation",
                self.allocation in get_args(Rule),
                f"one of {', '.join(get_args(Rule))}",
            ),
            ("error_exponent", is_positive(self.error_exponent), "a number above 0"),
            ("max_rank_fraction", is_fraction, "a number above 0 and at most 1"),
            ("gradient_images", is_count(self.gradient_images), "a whole number from 1 on"),
            ("regression", isinstance(self.regression, bool), "true or false"),
            ("fine_tune", isinstance(self.fine_tune, bool), "true or false"),
            ("curves", isinstance(self.curves, bool), "true or false"),
            *_kl_rules(self),
        )

    def check(self, cost: Cost, target: Target) -> None:
        """Raise TargetError if the chosen layers alone cannot meet the target."""
        if target.metric == "units":
            raise TargetError("target.units: low ranks remove no units; set target.params or macs")
        pieces = self._pieces(cost.structure)
        if self.allocation == "kl":
            check_linear(cost, pieces)
        equal = {name: [1.0] * min(piece.rows, piece.columns) for name, piece in pieces.items()}
        if not equal:
            raise TargetError(
                f"method.layers={[*self.layers]}: this network has none that can be factorised"
            )
        self._ranks(cost, target, equal, "uniform" if self.allocation == "uniform" else "loss")

    def scorer(self, net: nn.Module) -> Profile | LossScorer:
        """Return the pass over calibration images; over no images where none are needed."""
        if self.allocation == "kl":
            return loss_scorer(
                net,
                [*self._pieces(structure(net))],
                losses=self.losses,
                ridges=self.ridges,
                sampling=self._sampling,
            )
        by_loss = "loss" in (self.decomposition, self.allocation)
        needed = self.decomposition != "plain" or by_loss
        return Profile(
            net,
            pieces=self._pieces(structure(net)) if needed else {},
            decomposition=self.decomposition,
            sampling=self._sampling,
            gradient_images=self.gradient_images if by_loss else 0,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Decompose every layer and factorise those that lose least."""
        rule = self.allocation
        if not evidence.moments and (self.decomposition != "plain" or rule in ("loss", "kl")):
            _log.info("no calibration images: plain decompositions, one fraction for all layers")
            rule = "uniform"
        if rule == "kl":
            by_kl = losses_of(evidence, [*self._pieces(cost.structure)])
            return proposal_of(net, evidence, by_kl, self._ranks(cost, target, by_kl, rule))
        losses, curves = {}, {}
        for name, piece in self._pieces(cost.structure).items():
            statistics = statistics_of(name, piece, evidence)
            spectrum = self._spectrum(net, piece, statistics)
            of_layer = component_losses(spectrum, statistics, self.decomposition, rule)
            losses[name] = of_layer.tolist()
            if self.curves:
                curves[name] = _curves(net, piece, spectrum, evidence)
        ranks = self._ranks(cost, target, losses, rule)
        return Proposal(
            edits=tuple(LowRank(linear=name, rank=rank) for name, rank in ranks.items()),
            notes={
                "decomposition": self.decomposition if evidence.moments else "plain",
                "allocation": rule,
            },
            diagnostics={"curves": curves} if curves else {},
        )

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the factors under the metric, and biases that keep the mean output.

        In the paper's metrics the mean is included, and the bias stays.
        """
        if not evidence.moments:
            return {}
        pieces = self._pieces(structure(net))
        values = {}
        for edit in plan.low_ranks():
            name, piece = edit.linear, pieces[edit.linear]
            layer = compact.get_submodule(name)
            assert isinstance(layer, LowRankLinear)
            spectrum = self._spectrum(net, piece, statistics_of(name, piece, evidence))
            factors = spectrum.factors(max(1, edit.rank - self.residual.rank))
            reads = layer.down.get_parameter("weight")
            up, down = torch.zeros_like(layer.up.weight), torch.zeros_like(reads)
            up[:, : factors[0].shape[1]], down[: len(factors[1])] = factors
            values[f"{name}.up.weight"], values[f"{name}.down.weight"] = up, down
            if self.decomposition in CENTRED and layer.up.bias is not None:
                mean = evidence.moments[piece.layer]["mean"]
                offset = lost_output(piece.weight_in(net), up, down, mean)
                values[f"{name}.up.bias"] = layer.up.bias.detach() + offset.to(up)
        return values

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> Iterator[Phase]:
        """Yield regression, residual, mimicking and recovery, those that are asked for."""
        del evidence  # large, and not needed: not to be kept until the last phase
        if self.regression:
            yield Regress(student, teacher, sampling=self._sampling, ridge=self.ridges.regression)
        residual = Residual(
            student,
            teacher,
            rank=self.residual.rank,
            sampling=self._sampling,
            recipe=self.residual.training,
        )
        if residual.ranks:
            yield residual
        settings, images = self.tuning.recovery, self.sampling.images
        if self.tuning.trained != "none":
            frozen = _factors(student) if self.tuning.trained == "uncompressed" else ()
            yield Mimic(
                student,
                teacher,
                recipe=self.tuning.training,
                pooled_weight=self.tuning.pooled_weight,
                frozen=frozen,
                images=AllButHeldOut(of=settings.images(images)) if self.fine_tune else None,
            )
        if self.fine_tune:
            yield Recovery(student, teacher, settings=settings, images=images)

    @property
    def _sampling(self) -> Sampling:
        """The sampling, without the images that a recovery holds out."""
        return self.tuning.recovery.calibration(self.sampling) if self.fine_tune else self.sampling

    def _pieces(self, described: Structure) -> dict[str, Piece]:
        return pieces_of(described, self.layers, separate=self.qkv == "separate")

    def _spectrum(self, net: nn.Module, piece: Piece, statistics: Mapping[str, Tensor]) -> Spectrum:
        biased = net.get_submodule(piece.layer).bias is not None
        return spectrum_of(
            piece.weight_in(net), statistics, self.decomposition, self.ridges, biased=biased
        )

    def _ranks(
        self, cost: Cost, target: Target, losses: Mapping[str, Sequence[float]], rule: Rule
    ) -> dict[str, int]:
        return ranks_within(
            cost,
            target,
            losses,
            rule,
            max_rank_fraction=self.max_rank_fraction,
            error_exponent=self.error_exponent,
        )


def _kl_rules(method: MixedRank) -> list[tuple[str, bool, str]]:
    """Return what the allocation `kl` cannot be combined with."""
    if method.allocation != "kl":
        return []
    return [
        ("qkv", method.qkv == "fused", "fused, with method.allocation=kl"),
        ("decomposition", method.decomposition == "loss", "loss, with method.allocation=kl"),
        (
            "curves",
            not method.curves,
            "false, with method.allocation=kl: its statistics are weighted by gradients",
        ),
    ]


def _curves(
    net: nn.Module, piece: Piece, spectrum: Spectrum, evidence: Evidence
) -> dict[str, Sequence[float]]:
    """Return a layer's curves for figures, with output errors that include the mean."""
    statistics = evidence.moments.get(piece.layer, {})
    metric = input_gram("whitening", statistics) if "cov" in statistics else None
    return rank_curves(piece.weight_in(net), spectrum, metric)


def _factors(net: nn.Module) -> Collection[str]:
    """Return the names of the weights of all factors."""
    return {
        f"{name}.{factor}.weight"
        for name, module in net.named_modules()
        if isinstance(module, LowRankLinear)
        for factor in ("down", "up")
    }
