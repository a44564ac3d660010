"""Activation-aware mixed-rank compression: Linear layers in two factors, each of its own rank.

After "Memory-Efficient Vision Transformers: An Activation-Aware Mixed-Rank Compression Strategy"
(arXiv 2402.06004). The paper's: decompositions by the normalised output error, or by a mean input;
greedy ranks by energy per weight; a residual of its own rank trained by the gradient of each
layer's output error and merged by concatenation; then training of the uncompressed parameters. Its
full text was not at hand: these are reconstructions from its abstract and from accounts of it, and
no number in conf/method/mixed_rank.yaml is the paper's but the -60 % of strength 5.

Ours: the decomposition and the allocation by loss (`vitrim.network.decompose`), along the hulls of
error curves (`vitrim.method.mixed_rank.ranks`), and the sequential regression
(`vitrim.method.mixed_rank.regress`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError, check_strength, choose
from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.method.mixed_rank.metric import METRICS, Metric, curves, mattering, metric_of
from vitrim.method.mixed_rank.profile import Piece, Profile
from vitrim.method.mixed_rank.ranks import Curve, allocate, least
from vitrim.method.mixed_rank.regress import Regress
from vitrim.method.mixed_rank.residual import Residual
from vitrim.network import structure
from vitrim.network.decompose import Spectrum, decompose
from vitrim.network.factored import LowRankLinear
from vitrim.network.structure import Structure, runs_of
from vitrim.network.survivors import settle
from vitrim.plan import Evidence, LowRank, Plan
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import Mimic
from vitrim.trainer.recipe import Recipe

_log = logging.getLogger(__name__)

LAYERS = ("qkv", "proj", "fc1", "fc2")
Rows = Literal["together", "split"]
Rule = Literal["uniform", "energy", "error", "loss"]
Trained = Literal["none", "uncompressed", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ridges:
    """How strongly least squares is held back, relative to the mean variance of its inputs.

    `metric` in decompositions, `regression` in solving the ends of branches anew; `derivatives` is
    the share of the products of derivatives by different outputs that is left out.
    """

    metric: float
    regression: float
    derivatives: float

    def __post_init__(self) -> None:
        share = is_rate(self.derivatives) and self.derivatives <= 1
        require(
            "method.ridges",
            self,
            ("metric", is_positive(self.metric), "a number above 0"),
            ("regression", is_positive(self.regression), "a number above 0"),
            ("derivatives", share, "a number in 0..1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Compensation:
    """A residual of `rank`, trained by `training`, in every factorised layer; 0 for none."""

    rank: int
    training: Recipe

    def __post_init__(self) -> None:
        fits = self.rank == 0 or is_count(self.rank)
        require("method.residual", self, ("rank", fits, "a whole number from 0 on"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Mimicking of the dense network's features at the end, of which parameters, and how.

    `pooled` weighs the error of what the classifier reads beside that of all tokens.
    """

    trained: Trained
    pooled: float
    training: Recipe

    def __post_init__(self) -> None:
        allowed = get_args(Trained)
        for rule in (
            ("trained", self.trained in allowed, ", ".join(allowed)),
            ("pooled", is_rate(self.pooled), "a number from 0 on"),
        ):
            require("method.tuning", self, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedRank:
    """Metrics, allocations and recoveries; every number comes from conf/method/mixed_rank.yaml."""

    name: str
    strength: float | None
    target: Mapping[str, Any]
    levels: Sequence[float]
    layers: Sequence[str]
    qkv: Rows
    decomposition: Metric
    allocation: Rule
    spread: float
    max_share: float
    ridges: Ridges
    sampling: Sampling
    loss_images: int
    regression: bool
    residual: Compensation
    tuning: Tuning
    curves: bool

    def __post_init__(self) -> None:
        share = is_positive(self.max_share) and self.max_share <= 1
        require(
            "method",
            self,
            (
                "layers",
                bool(self.layers) and set(self.layers) <= {*LAYERS},
                f"a list of {', '.join(LAYERS)}",
            ),
            ("qkv", self.qkv in get_args(Rows), "together or split"),
            ("decomposition", self.decomposition in METRICS, f"one of {', '.join(METRICS)}"),
            ("allocation", self.allocation in get_args(Rule), "uniform, energy, error or loss"),
            ("spread", is_positive(self.spread), "a number above 0"),
            ("max_share", share, "a number above 0 and at most 1"),
            ("loss_images", is_count(self.loss_images), "a whole number from 1 on"),
            ("regression", isinstance(self.regression, bool), "true or false"),
            ("curves", isinstance(self.curves, bool), "true or false"),
        )
        check_strength(self.strength, self.levels, where=f"conf/method/{self.name}.yaml")
        if self.budget.metric == "units":
            raise TargetError("target.units: low ranks remove no units; set target.params or macs")

    @property
    def budget(self) -> Target:
        """The target that is set, or the share of params that `strength` keeps."""
        return choose(self.strength, self.levels, self.target, metric="params")

    def check(self, cost: Cost) -> None:
        """Raise TargetError if the chosen layers alone cannot meet the budget."""
        energies = {
            name: [1.0] * min(piece.rows, piece.columns)
            for name, piece in self._pieces(cost.structure)
        }
        if not energies:
            raise TargetError(
                f"method.layers={[*self.layers]}: this network has none that can be factorised"
            )
        self._ranks(cost, energies, "uniform" if self.allocation == "uniform" else "loss")

    def scorer(self, net: nn.Module) -> Profile:
        """Return the pass over proxy images; of no image where none is needed."""
        pieces = dict(self._pieces(structure(net)))
        by_loss = "loss" in (self.decomposition, self.allocation)
        needed = self.decomposition != "plain" or by_loss
        return Profile(
            net,
            pieces=pieces if needed else {},
            metric=self.decomposition,
            sampling=self.sampling,
            loss_images=self.loss_images if by_loss else 0,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost) -> Plan:
        """Decompose every layer and factorise those that lose least."""
        rule = self.allocation
        if not evidence.moments and (self.decomposition != "plain" or rule == "loss"):
            _log.info("no proxy images: plain decompositions, the same share of every layer")
            rule = "uniform"
        energies, drawn = {}, {}
        for name, piece in self._pieces(cost.structure):
            found = self._found(name, piece, evidence)
            spectrum = self._spectrum(net, piece, found)
            energies[name] = self._worth(spectrum, found, rule).tolist()
            if self.curves:
                drawn[name] = self._curves(net, piece, spectrum, evidence)
        ranks = self._ranks(cost, energies, rule)
        return Plan(
            model={},
            edits=tuple(LowRank(linear=name, rank=rank) for name, rank in ranks.items()),
            provenance={
                "method": self.name,
                "strength": self.strength,
                "decomposition": self.decomposition if evidence.moments else "plain",
                "allocation": rule,
                **({"curves": drawn} if drawn else {}),
            },
        )

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the factors of the metric; what they do to the mean goes into the bias.

        Of the paper's metrics the mean is a part, and the bias stays.
        """
        if not evidence.moments:
            return {}
        pieces = dict(self._pieces(structure(net)))
        values = {}
        for edit in plan.low_ranks():
            piece = pieces[edit.linear]
            layer = compact.get_submodule(edit.linear)
            assert isinstance(layer, LowRankLinear)
            spectrum = self._spectrum(net, piece, self._found(edit.linear, piece, evidence))
            factors = spectrum.factors(max(1, edit.rank - self.residual.rank))
            up, down = torch.zeros_like(layer.up.weight), torch.zeros_like(layer.down.weight)
            up[:, : factors[0].shape[1]], down[: len(factors[1])] = factors
            values[f"{edit.linear}.up.weight"], values[f"{edit.linear}.down.weight"] = up, down
            if self.decomposition in ("centred", "loss") and layer.up.bias is not None:
                lost = piece.of(net.get_parameter(f"{piece.layer}.weight")) - up @ down
                mean = evidence.moments[piece.layer]["mean"]
                offset = (lost.double() @ mean).to(lost)
                values[f"{edit.linear}.up.bias"] = layer.up.bias.detach() + offset
        return values

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> Iterator[LightningModule]:
        """Give regression, residual and training, those that are asked for, each as it begins."""
        if self.regression:
            yield Regress(student, teacher, sampling=self.sampling, ridge=self.ridges.regression)
        residual = Residual(
            student,
            teacher,
            rank=self.residual.rank,
            sampling=self.sampling,
            recipe=self.residual.training,
        )
        if residual.ranks:
            yield residual
        if self.tuning.trained != "none":
            frozen = _factors(student) if self.tuning.trained == "uncompressed" else ()
            yield Mimic(
                student,
                teacher,
                recipe=self.tuning.training,
                pooled=self.tuning.pooled,
                frozen=frozen,
            )

    def _pieces(self, described: Structure) -> Iterator[tuple[str, Piece]]:
        """Iterate over what may be factorised, by the names that plans have for it."""
        for layer in described.layers:
            if layer.factor or layer.locked or _kind(layer.name) not in self.layers:
                continue
            whole, *pieces = runs_of(layer).items()
            columns = sum(part.size for part in layer.inp)
            for name, out in pieces if self.qkv == "split" and pieces else [whole]:
                rows = sum(part.size for part in out)
                yield name, Piece(layer.name, out[0].offset, rows, columns)

    def _found(self, name: str, piece: Piece, evidence: Evidence) -> dict[str, Tensor]:
        """Return what is known of a piece: its layer's moments, and derivatives by its outputs."""
        found = {**evidence.moments.get(piece.layer, {}), **evidence.moments.get(name, {})}
        return found | ({"slope": piece.of(found["slope"])} if "slope" in found else {})

    def _metric(self, found: Mapping[str, Tensor], *, biased: bool) -> Tensor | None:
        centred = self.decomposition in ("centred", "loss")  # without a bias, nothing takes means
        return metric_of("whitening" if centred and not biased else self.decomposition, found)

    def _spectrum(self, net: nn.Module, piece: Piece, found: Mapping[str, Tensor]) -> Spectrum:
        weight = piece.of(net.get_parameter(f"{piece.layer}.weight"))
        if not found:
            return decompose(weight, None, ridge=self.ridges.metric)
        biased = net.get_submodule(piece.layer).bias is not None
        metric, outputs = self._metric(found, biased=biased), None
        if self.decomposition == "loss":
            how = found["products"], found["slope"], self.ridges.derivatives
            outputs = mattering(weight, *how)
        spectrum = decompose(weight, metric, ridge=self.ridges.metric, outputs=outputs)
        if self.decomposition == "loss" and outputs is None:  # nothing depends on these outputs
            return spectrum._replace(energy=torch.zeros_like(spectrum.energy))
        return spectrum

    def _curves(
        self, net: nn.Module, piece: Piece, spectrum: Spectrum, evidence: Evidence
    ) -> dict[str, Sequence[float]]:
        """Return what figures draw of a layer; errors of outputs as they are, the mean included."""
        found = evidence.moments.get(piece.layer, {})
        metric = metric_of("whitening", found) if "cov" in found else None
        return curves(piece.of(net.get_parameter(f"{piece.layer}.weight")), spectrum, metric)

    def _worth(self, spectrum: Spectrum, found: Mapping[str, Tensor], rule: Rule) -> Tensor:
        """Return what leaving out each component costs: output error, or its effect on logits."""
        by_loss = self.decomposition == "loss"
        if rule == "error" and by_loss and "cov" in found:
            down, parts = spectrum.down.double(), spectrum.up.double().square().sum(0)
            errors = parts * (down @ found["cov"].double() * down).sum(1)
            return torch.where(spectrum.energy > 0, errors, 0.0)
        if rule != "loss" or by_loss or "slope" not in found:
            return spectrum.energy
        parts = spectrum.up.double().square()
        gain = (found["slope"][:, None] * parts).sum(0) / parts.sum(0).clamp_min(1e-300)
        return spectrum.energy * gain

    def _ranks(
        self, cost: Cost, energies: Mapping[str, Sequence[float]], rule: Rule
    ) -> dict[str, int]:
        """Return ranks within the budget."""
        whole = settle(cost.structure, {})
        metric = self.budget.unit

        def total(ranks: Mapping[str, int]) -> int:
            return int(getattr(cost.of(whole, (), ranks), metric))

        dense, layers = total({}), {}
        for name, energy in energies.items():
            one, two = total({name: 1}), total({name: 2})
            layers[name] = Curve(energy, step=two - one, dense=dense - one + (two - one))
        rest = dense - sum(curve.dense for curve in layers.values())
        limit = cost.allowed(self.budget)
        share = 1.0 if rule == "uniform" else self.max_share
        lowest = rest + least(layers, share)
        if lowest > limit:
            raise TargetError(
                f"target.{self.budget.metric}={self.budget.keep} cannot be reached: rank 1 in "
                f"every one of method.layers leaves {lowest:,} {metric}, not {limit:,}"
            )
        return allocate(
            layers,
            limit - rest,
            how="uniform" if rule == "uniform" else "greedy" if rule == "energy" else "hull",
            max_share=share,
            spread=self.spread,
        )


def _kind(name: str) -> str:
    """Return which of LAYERS the layer at a path is: pieces of qkv, and both openers of a SwiGLU.

    >>> _kind("blocks.0.attn.qkv.q"), _kind("blocks.0.mlp.fc1_g"), _kind("blocks.0.mlp.fc2")
    ('qkv', 'fc1', 'fc2')
    """
    *_, above, last = ["", *name.split(".")]
    return above if above == "qkv" else last.removesuffix("_g").removesuffix("_x")


def _factors(net: nn.Module) -> Collection[str]:
    """Return the names of the weights of all factors."""
    return {
        f"{name}.{factor}.weight"
        for name, module in net.named_modules()
        if isinstance(module, LowRankLinear)
        for factor in ("down", "up")
    }
