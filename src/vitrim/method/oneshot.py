"""One-shot pruning: a criterion ranks units, the rest is made up for in closed form.

One pass over unlabelled images gathers moments; a criterion (`vitrim.closed_form.importance`) ranks
the units of any set of sites; a compensation (`vitrim.closed_form.reconstruction`,
`vitrim.trainer.refit`) changes the kept weights so that the outputs stay near the dense network's.
Nothing is trained unless `fine_tune` is set. The default, greedy surgeon order with sequential
error-correcting regression, follows OB2C (arXiv 2608.17657) and CORP (arXiv 2602.05243) in the
closed form and is ours in the greedy order, in the regression on the compact network's own
activations, in how tokens are weighted, and in the classifier's closing regression.

AIminify (its blog's tables, no paper) is this with MLP units ranked globally by magnitude and
fine-tuned. The blog does not say how units are chosen: the criterion is our reading, the number of
removed neurons is the blog's own, to the last digit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError, check_strength, choose
from vitrim.budget.trim import Scope, trim
from vitrim.closed_form.importance import CRITERIA, WITHOUT_IMAGES, Criterion, score
from vitrim.closed_form.reconstruction import COMPENSATIONS, Compensation, compensated
from vitrim.errors import ConfigError, is_count, is_positive, is_rate, require
from vitrim.network import structure
from vitrim.network.structure import Structure
from vitrim.plan import Evidence, Keep, Plan
from vitrim.trainer.calibrate import Calibrate, Sampling
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Distill, Mimic
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.refit import Refit

_log = logging.getLogger(__name__)

SITES = {
    "mlp": ".hidden",
    "heads": "attn.heads",
    "qk": "attn.qk",
    "v": "attn.v",
    "channels": ".channels",
}
Objective = Literal["labels", "mimic", "distill"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ridges:
    """How strongly least squares is held back, relative to the mean variance of its inputs.

    `order` in ranking units, `fold` in folding removed units into kept ones, `closing` in the
    regression of the classifier's input.
    """

    order: float
    fold: float
    closing: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require("method.ridges", self, (name, is_positive(value), "a number above 0"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Training after the cut: for `labels`, to `mimic` features, or to `distill` probabilities.

    `pooled` weighs the error of what the classifier reads beside that of all tokens, and `logits` a
    distillation loss beside mimicking; `temperature` is that of both kinds of distillation.
    """

    objective: Objective
    pooled: float
    logits: float
    temperature: float
    training: Recipe

    def __post_init__(self) -> None:
        objectives = get_args(Objective)
        for rule in (
            ("objective", self.objective in objectives, ", ".join(objectives)),
            ("pooled", is_rate(self.pooled), "a number from 0 on"),
            ("logits", is_rate(self.logits), "a number from 0 on"),
            ("temperature", is_positive(self.temperature), "a number above 0"),
        ):
            require("method.tuning", self, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class OneShot:
    """Criteria and compensations; every number comes from conf/method/{oneshot,aiminify}.yaml."""

    name: str
    model: str
    strength: float | None
    target: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]]
    sites: Sequence[str]
    criterion: Criterion
    compensation: Compensation
    scope: Scope
    pace: Mapping[str, float]
    round_to: int
    even_heads: bool
    seed: int
    sampling: Sampling
    ridges: Ridges
    fine_tune: bool
    tuning: Tuning

    def __post_init__(self) -> None:
        require(
            "method",
            self,
            ("criterion", self.criterion in CRITERIA, f"one of {', '.join(CRITERIA)}"),
            (
                "compensation",
                self.compensation in COMPENSATIONS,
                f"one of {', '.join(COMPENSATIONS)}",
            ),
            (
                "sites",
                bool(self.sites) and set(self.sites) <= SITES.keys(),
                f"a list of {', '.join(SITES)}",
            ),
            (
                "pace",
                self.pace.keys() <= SITES.keys()
                and all(is_positive(share) for share in self.pace.values()),
                f"numbers above 0 for {', '.join(SITES)}",
            ),
            ("scope", self.scope in ("global", "site"), "global or site"),
            ("round_to", is_count(self.round_to), "a whole number from 1 on"),
            ("even_heads", isinstance(self.even_heads, bool), "true or false"),
            ("fine_tune", isinstance(self.fine_tune, bool), "true or false"),
        )
        check_strength(self.strength, self.levels, where=f"conf/method/{self.name}.yaml")
        choose(self.strength, self.levels, self.target, metric="units")

    @property
    def levels(self) -> list[float]:
        """The share of units kept at strengths 0 to 5, from the table of the model's family."""
        fits = [family for family in self.tables if self.model.startswith(family)]
        if not fits and "default" not in self.tables:
            raise ConfigError(
                f"method.tables: none of {', '.join(self.tables)} begins the name {self.model}, "
                "and there is no table named default"
            )
        table = self.tables[max(fits, key=len, default="default")]
        return [1 - removed / table["of"] for removed in table["removed"]]

    @property
    def budget(self) -> Target:
        """The target that is set, or the share of units that `strength` keeps."""
        return choose(self.strength, self.levels, self.target, metric="units")

    def check(self, cost: Cost) -> None:
        """Raise TargetError if the chosen sites are not there, of factors, or too few."""
        sites = cost.structure.sites
        there = [kind for kind, end in SITES.items() if any(name.endswith(end) for name in sites)]
        if not set(self.sites) <= set(there):
            raise TargetError(
                f"method.sites={[*self.sites]}: expected what this network has, {', '.join(there)}"
            )
        chosen = self._of(cost.structure)
        branches = {name.rpartition(".")[0] for name in chosen}
        for layer in cost.structure.layers:
            if layer.factor and layer.branch in branches:
                raise TargetError(
                    f"{layer.name}: method.sites={[*self.sites]} ranks the units of whole layers, "
                    "and this one is in two factors: slice first and factorise then, or choose "
                    "other sites"
                )
        self._trim(cost, {name: torch.ones(sites[name].size) for name in chosen})

    def scorer(self, net: nn.Module) -> Calibrate:
        """Return the pass over calibration images; of no image where none is needed."""
        needed = self.criterion not in WITHOUT_IMAGES or self.compensation != "none"
        names = self._of(structure(net)) if needed else []
        return Calibrate(
            net,
            sites=names,
            sampling=self.sampling,
            taylor=self.criterion == "taylor",
            targets=self.compensation == "sequential",
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost) -> Plan:
        """Remove the units that the criterion ranks lowest."""
        criterion = self.criterion
        if not evidence.moments and criterion not in WITHOUT_IMAGES:
            _log.info("no calibration images: units are ranked by group_l2, not %s", criterion)
            criterion = "group_l2"
        described = cost.structure
        removed = self._removed(cost)
        scores = {
            name: score(
                net,
                described,
                evidence.moments,
                described.sites[name],
                criterion=criterion,
                ridge=self.ridges.order,
                seed=self.seed,
                most=removed.get(name),
            )
            for name in self._of(described)
        }
        provenance = {
            "method": self.name,
            "strength": self.strength,
            "criterion": criterion,
            "compensation": self.compensation,
        }
        return Plan(model={}, edits=self._trim(cost, scores), provenance=provenance)

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the weights that make up for what is cut."""
        if not evidence.moments:
            return {}
        return compensated(
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
    ) -> list[LightningModule]:
        """Return the sequential regression, if asked for, and the training, if asked for."""
        phases: list[LightningModule] = []
        if self.compensation == "sequential":
            phases.append(
                Refit(
                    student,
                    evidence=evidence,
                    sampling=self.sampling,
                    ridge=self.ridges.fold,
                    closing_ridge=self.ridges.closing,
                )
            )
        if self.fine_tune:
            phases.append(self._training(student, teacher, n_classes))
        return phases

    def _training(self, student: nn.Module, teacher: nn.Module, n_classes: int) -> LightningModule:
        by = self.tuning
        match by.objective:
            case "mimic":
                return Mimic(
                    student,
                    teacher,
                    recipe=by.training,
                    pooled=by.pooled,
                    logits=by.logits,
                    temperature=by.temperature,
                )
            case "distill":
                return Distill(student, teacher, recipe=by.training, temperature=by.temperature)
            case _:
                return Classify(student, recipe=by.training, n_classes=n_classes)

    def _of(self, described: Structure) -> list[str]:
        """Return the names of the chosen sites, in network order; locked ones if all are."""
        endings = tuple(SITES[kind] for kind in self.sites)
        sites = [site for name, site in described.sites.items() if name.endswith(endings)]
        return [site.name for site in sites if not site.locked] or [site.name for site in sites]

    def _removed(self, cost: Cost) -> dict[str, int]:
        """Return how many units each site will lose, where scores cannot change that."""
        sites = cost.structure.sites
        names = self._of(cost.structure)
        if self.scope == "global" or any(sites[name].head_dims for name in names):
            return {}
        kept = {
            keep.site: len(keep.index)
            for keep in self._trim(cost, {name: torch.ones(sites[name].size) for name in names})
        }
        return {name: sites[name].size - kept.get(name, sites[name].size) for name in names}

    def _trim(self, cost: Cost, scores: Mapping[str, Tensor]) -> tuple[Keep, ...]:
        return trim(
            cost,
            scores,
            self.budget,
            scope=self.scope,
            round_to=self.round_to,
            even_heads=self.even_heads,
            pace={
                name: pace
                for kind, pace in self.pace.items()
                for name in scores
                if name.endswith(SITES[kind])
            },
        )
