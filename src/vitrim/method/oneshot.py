"""One-shot pruning: a criterion ranks units, and kept weights compensate in closed form.

One pass over unlabelled images gathers moments. A criterion (`vitrim.closed_form.importance`) ranks
the units of any set of sites; a compensation (`vitrim.closed_form.reconstruction`,
`vitrim.trainer.refit`) changes the kept weights so that the outputs stay near the dense network's.
Nothing is trained unless `fine_tune` is set. The default, the greedy OBS order with sequential
error-correcting regression, follows OB2C (arXiv 2608.17657) and CORP (arXiv 2602.05243) in the
closed form. The greedy order, the regression on the compact network's own activations, the
weighting of tokens, and the final regression of the classifier are ours.

AIminify (its blog's tables, no paper) is this method with MLP units ranked globally by magnitude,
and fine-tuning. The blog does not say how units are chosen: the criterion is our reading. The
number of removed neurons is the blog's own, to the last digit.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.budget.trim import mean_savings, trim
from vitrim.closed_form.importance import CRITERIA, WITHOUT_IMAGES, Criterion, importance
from vitrim.closed_form.reconstruction import COMPENSATIONS, Compensation, reconstruct
from vitrim.errors import ConfigError, is_count, is_positive, require
from vitrim.method import Granularity
from vitrim.network import structure
from vitrim.network.structure import Kind, Site, Structure, of_kind
from vitrim.plan import Evidence, Keep, Plan, Proposal
from vitrim.sensitivity.ordered import OrderedLosses, UnitOrder
from vitrim.sensitivity.settings import LossSettings
from vitrim.trainer.calibrate import Calibrate, Sampling
from vitrim.trainer.phase import Phase
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.refit import Refit
from vitrim.trainer.tuning import OneShotTuning

_log = logging.getLogger(__name__)

SITES: Mapping[str, Kind] = {
    "mlp": "hidden",
    "heads": "heads",
    "qk": "qk",
    "v": "v",
    "channels": "channels",
}
ALIASES: Mapping[str, Criterion] = {"surgeon": "obs_greedy"}
"""Former names of criteria, which are still accepted."""
Scope = Literal["site", "global", "loss"]
"""How sites are compared: each loses the same fraction, by score, or by predicted loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OneShotRidges:
    """The ridges of the least-squares problems, relative to the mean variance of their inputs.

    `order` is for ranking units, `fold` for folding removed units into kept ones, `closing` for the
    regression of the classifier's input.
    """

    order: float
    fold: float
    closing: float

    def __post_init__(self) -> None:
        rules = [
            (name, is_positive(ridge), "a number above 0") for name, ridge in asdict(self).items()
        ]
        require("method.ridges", self, *rules)


class Table(TypedDict):
    """Units removed at strengths 0 to 5, of the number there are in one family of networks."""

    removed: Sequence[float]
    of: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OneShot:
    """Criteria and compensations; every number comes from conf/method/{oneshot,aiminify}.yaml."""

    model: str
    tables: Mapping[str, Table]
    sites: Sequence[str]
    criterion: Criterion
    compensation: Compensation
    scope: Scope
    losses: LossSettings
    site_rates: Mapping[str, float]
    round_to: int
    even_heads: bool
    seed: int
    sampling: Sampling
    ridges: OneShotRidges
    fine_tune: bool
    tuning: OneShotTuning
    metric: ClassVar[Metric] = "units"
    granularity: ClassVar[Granularity] = "unit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "criterion", ALIASES.get(self.criterion, self.criterion))
        rates_fit = self.site_rates.keys() <= SITES.keys() and all(
            is_positive(rate) for rate in self.site_rates.values()
        )
        kinds = ", ".join(SITES)
        require(
            "method",
            self,
            ("criterion", self.criterion in CRITERIA, f"one of {', '.join(CRITERIA)}"),
            (
                "compensation",
                self.compensation in COMPENSATIONS,
                f"one of {', '.join(COMPENSATIONS)}",
            ),
            ("sites", bool(self.sites) and set(self.sites) <= SITES.keys(), f"a list of {kinds}"),
            ("site_rates", rates_fit, f"numbers above 0 for {kinds}"),
            ("scope", self.scope in get_args(Scope), "site, global or loss"),
            ("round_to", is_count(self.round_to), "a whole number from 1 on"),
            ("even_heads", isinstance(self.even_heads, bool), "true or false"),
            ("fine_tune", isinstance(self.fine_tune, bool), "true or false"),
        )
        _table_of(self.model, self.tables)

    @property
    def levels(self) -> list[float]:
        """The fraction of units kept at strengths 0 to 5, from the table of the model's family."""
        table = _table_of(self.model, self.tables)
        return [1 - removed / table["of"] for removed in table["removed"]]

    def check(self, cost: Cost, target: Target) -> None:
        """Raise TargetError if the chosen sites are missing, in two factors, or too few."""
        kinds = {site.kind for site in cost.structure.sites.values()}
        available = [name for name, kind in SITES.items() if kind in kinds]
        if not set(self.sites) <= set(available):
            raise TargetError(
                f"method.sites={[*self.sites]}: expected what this network has, "
                f"{', '.join(available)}"
            )
        if self.scope == "loss" and "channels" in self.sites:
            raise TargetError(
                "method.scope=loss: the losses of convolutional channels are not predicted; set "
                "method.scope=site or global, or leave channels out of method.sites"
            )
        chosen = sites_of(cost.structure, self.sites)
        branches = {site.name.rpartition(".")[0] for site in chosen}
        for layer in cost.structure.layers:
            if layer.factor and layer.branch in branches:
                raise TargetError(
                    f"{layer.name}: method.sites={[*self.sites]} ranks the units of whole layers, "
                    "and this one is in two factors: slice first and factorise then, or choose "
                    "other sites"
                )
        trimmed(self, cost, _equal_scores(chosen), target)

    def scorer(self, net: nn.Module) -> Calibrate:
        """Return the pass over calibration images; over no images where none are needed."""
        needed = (
            self.scope == "loss"
            or self.criterion not in WITHOUT_IMAGES
            or self.compensation != "none"
        )
        sites = [site.name for site in sites_of(structure(net), self.sites)] if needed else []
        return Calibrate(
            net,
            sites=sites,
            sampling=self.calibration,
            taylor=self.criterion == "taylor",
            losses=_losses(self, net, sites) if self.scope == "loss" else None,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Remove the units that the criterion ranks lowest, or those that lose least there."""
        criterion = self.criterion
        if self.scope == "loss" and evidence.scores:
            return _plan_by_loss(self, evidence.scores, cost, target)
        if not evidence.moments and criterion not in WITHOUT_IMAGES:
            _log.info("no calibration images: units are ranked by group_l2, not %s", criterion)
            criterion = "group_l2"
        if self.scope == "loss":
            _log.info("no calibration images: every site loses the same fraction of its units")
        n_removed = self._n_removed(cost, target)
        scores = {
            site.name: importance(
                net,
                cost.structure,
                evidence.moments,
                site,
                criterion=criterion,
                ridge=self.ridges.order,
                seed=self.seed,
                n_removed=n_removed.get(site.name),
            )
            for site in sites_of(cost.structure, self.sites)
        }
        return Proposal(
            edits=trimmed(self, cost, scores, target),
            notes={"criterion": criterion, "compensation": self.compensation},
        )

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the weights that compensate for the cut."""
        if not evidence.moments:
            return {}
        return reconstruct(
            net,
            compact,
            structure(net),
            plan,
            evidence.moments,
            kind=self.compensation,
            ridge=self.ridges.fold,
        )

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> list[Phase]:
        """Return the sequential regression and the training, each if it is asked for."""
        phases: list[Phase] = []
        if self.compensation == "sequential":
            phases.append(
                Refit(
                    student,
                    teacher,
                    sampling=self.calibration,
                    ridge=self.ridges.fold,
                    closing_ridge=self.ridges.closing,
                )
            )
        if self.fine_tune:
            images = self.sampling.images
            phases.append(self.tuning.phase(student, teacher, images, n_classes))
        return phases

    @property
    def labelled_training(self) -> Sequence[Recipe]:
        """The fine-tuning, if it is with labels."""
        return self.tuning.labelled_training if self.fine_tune else ()

    @property
    def calibration(self) -> Sampling:
        """The sampling, without the images that a recovery holds out."""
        recovers = self.fine_tune and self.tuning.objective == "recovery"
        return self.tuning.recovery.calibration(self.sampling) if recovers else self.sampling

    def _n_removed(self, cost: Cost, target: Target) -> dict[str, int]:
        """Return how many units each site will lose, where scores cannot change that."""
        sites = sites_of(cost.structure, self.sites)
        if self.scope != "site" or any(site.head_dims for site in sites):
            return {}
        edits = trimmed(self, cost, _equal_scores(sites), target)
        n_kept = {keep.site: len(keep.index) for keep in edits}
        return {site.name: site.size - n_kept.get(site.name, site.size) for site in sites}


def sites_of(described: Structure, chosen: Collection[str]) -> list[Site]:
    """Return the chosen kinds of sites that can be cut, in network order; all if all are locked."""
    sites = of_kind(described, *(SITES[name] for name in chosen))
    return [site for site in sites if not site.locked_reason] or sites


def trimmed(
    method: OneShot,
    cost: Cost,
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    by_loss: bool = False,
) -> tuple[Keep, ...]:
    """Return the edits; without losses, the scope `loss` takes the same fraction of every site."""
    sites = cost.structure.sites
    return trim(
        cost,
        scores,
        target,
        scope="global" if by_loss or method.scope == "global" else "site",
        round_to=method.round_to,
        even_heads=method.even_heads,
        site_rates={
            name: rate
            for kind, rate in method.site_rates.items()
            for name in scores
            if sites[name].kind == SITES[kind]
        },
    )


def _losses(method: OneShot, net: nn.Module, sites: Sequence[str]) -> OrderedLosses:
    """Return what predicts the losses of units in the order of the criterion.

    Raises:
        ConfigError: the losses of some units are not predicted.
    """
    return OrderedLosses(
        net,
        sites,
        order=UnitOrder(method.criterion, method.ridges.order, method.seed),
        compensation=method.compensation,
        sampling=method.calibration,
        fold_ridge=method.ridges.fold,
        choices=method.losses,
    )


def _plan_by_loss(
    method: OneShot, losses: Mapping[str, Tensor], cost: Cost, target: Target
) -> Proposal:
    """Remove the units that lose least for what they save."""
    sites = sites_of(cost.structure, method.sites)
    savings = mean_savings(cost, sites, target, even_heads=method.even_heads)
    scores = {name: of_site / max(savings[name], 1e-12) for name, of_site in losses.items()}
    edits = trimmed(method, cost, scores, target, by_loss=True)
    lost = sum(
        float(losses[edit.site].sum() - losses[edit.site][[*edit.index]].sum())
        for edit in edits
        if edit.site in losses  # dims of removed heads go with these
    )
    notes: dict[str, object] = {
        "criterion": method.criterion,
        "compensation": method.compensation,
        "predicted_kl": lost,
    }
    return Proposal(edits=edits, notes=notes)


def _equal_scores(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return scores that rank no unit above another, by site."""
    return {site.name: torch.ones(site.size) for site in sites}


def _table_of(model: str, tables: Mapping[str, Table]) -> Table:
    """Return the table with the longest name that the model's name begins with, or the default.

    Raises:
        ConfigError: there is none.
    """
    families = [family for family in tables if model.startswith(family)]
    if not families and "default" not in tables:
        raise ConfigError(
            f"method.tables: none of {', '.join(tables)} begins the name {model}, "
            "and there is no table named default"
        )
    return tables[max(families, key=len, default="default")]
