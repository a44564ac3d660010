"""DC-ViT: dense few-shot compression (arXiv 2403.18708).

A few blocks lose their attention and most of their MLP; so few of them, and so much, that the
budget is met to within one hidden unit a block, where dropping whole blocks reaches a handful of
sizes only. Which blocks: those whose trial (`vitrim.method.dcvit.trials`) leaves the network
nearest to what it said of a set of images. Then the network mimics the dense one's features on a
few unlabelled images, in the front part up to the neighbour of the last compressed block. In Swin
the paper takes successive blocks in pairs, with plain windows and shifted ones (`together: 2`): a
candidate is a group, with one trial, and is compressed in all its blocks or in none.

Networks of convolutions have nothing in a block that could be reused, so there, as in the paper's
Table 4, whole blocks go: those with the lowest scores for the share of the MACs that they take
(ours: they differ in it), and the fewest that the budget needs.

The paper's: eqs. 1-6, Algorithm 1, that set dreamt up by the network (`metric_set: dream`), the
ablations of its Table 6 (`reuse` random, activation or none, `distance` mse, `mimic` class, `front`
false, `extra` blocks, `progressive` false). Ours: the count of MACs, which includes the attention's
products (`accounting: paper` is the paper's own), units by greedy surgeon order, least squares
before any training (`regression`), and the few images themselves to judge by. Of trials by least
squares on ViT-Ti, 500 images, they foretell best what a block costs: rank correlation 0.69 with the
top-1 lost, against -0.54 for 50 dreams of 100 iterations, on which early blocks look worse than
they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.blocks import (
    Group,
    dense_widths,
    fewest,
    groups_of,
    hidden_of,
    lone_blocks,
    share_of,
    whole_blocks,
)
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError, check_strength, choose
from vitrim.errors import ConfigError, is_count, is_positive, require
from vitrim.method.dcvit.accounting import paper_widths
from vitrim.method.dcvit.synthetic import Dream
from vitrim.method.dcvit.trials import (
    CANDIDATE,
    Distance,
    Reuse,
    Trials,
    best_of,
    learnt,
    plan_of_trial,
    solved,
)
from vitrim.network import structure
from vitrim.network.structure import Structure, blocks_of
from vitrim.network.surgery import cut
from vitrim.plan import BLOCKS, Drop, Evidence, Keep, Plan
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import Mimic, frozen
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.refit import Refit

_log = logging.getLogger(__name__)

Accounting = Literal["exact", "paper"]
Tokens = Literal["all", "class"]
MetricSet = Literal["images", "dream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ridges:
    """How strongly least squares is held back, relative to the mean variance of its inputs.

    `order` in ranking units, `fold` in solving last layers, `closing` for the classifier's input.
    """

    order: float
    fold: float
    closing: float

    def __post_init__(self) -> None:
        names = ("order", "fold", "closing")
        rules = ((name, is_positive(getattr(self, name)), "a number above 0") for name in names)
        require("method.ridges", self, *rules)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate by itself: the share `width` of its units kept, then mimicking by `training`.

    0 epochs rank candidates by least squares alone. All strengths share the trials; the paper's, of
    the width that a budget needs, are asked for by that width.
    """

    width: float
    training: Recipe

    def __post_init__(self) -> None:
        fits = is_positive(self.width) and self.width <= 1
        require("method.trial", self, ("width", fits, "a share above 0 and at most 1"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Mimicking after the cut, of all tokens or of what the classifier reads alone (`class`).

    `pooled` weighs the error of what the classifier reads beside that of all tokens; with `front`
    the rear of the network stays as it is.
    """

    mimic: Tokens
    pooled: float
    front: bool
    training: Recipe

    def __post_init__(self) -> None:
        require(
            "method.tuning",
            self,
            ("mimic", self.mimic in get_args(Tokens), "all or class"),
            ("pooled", self.pooled == 0 or is_positive(self.pooled), "a number from 0 on"),
            ("front", isinstance(self.front, bool), "true or false"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DCViT:
    """Attentions removed and MLPs shrunk in a few blocks; numbers are in conf/method/dcvit.yaml."""

    name: str
    strength: float | None
    target: Mapping[str, Any]
    levels: Sequence[float]
    accounting: Accounting
    together: int
    spare: Sequence[int]
    extra: int
    only: Sequence[str] | None
    reuse: Reuse
    regression: bool
    progressive: bool
    trial: Trial
    metric_set: MetricSet
    dream: Dream
    distance: Distance
    sampling: Sampling
    ridges: Ridges
    tuning: Tuning
    seed: int

    def __post_init__(self) -> None:
        require(
            "method",
            self,
            ("accounting", self.accounting in get_args(Accounting), "exact or paper"),
            ("together", is_count(self.together), "a whole number of blocks from 1 on"),
            (
                "spare",
                len(self.spare) == 2 and all(n == 0 or is_count(n) for n in self.spare),
                "two whole numbers: of first and of last blocks that stay whole",
            ),
            (
                "extra",
                self.extra == 0 or (is_count(self.extra) and self.accounting == "exact"),
                "a whole number from 0 on; 0 with accounting=paper",
            ),
            (
                "only",
                self.only is None or (bool(self.only) and not isinstance(self.only, str)),
                "null or a list of blocks",
            ),
            ("reuse", self.reuse in get_args(Reuse), f"one of {', '.join(get_args(Reuse))}"),
            ("regression", isinstance(self.regression, bool), "true or false"),
            ("progressive", isinstance(self.progressive, bool), "true or false"),
            ("metric_set", self.metric_set in get_args(MetricSet), "images or dream"),
            ("distance", self.distance in get_args(Distance), "kl or mse"),
        )
        check_strength(self.strength, self.levels, where=f"conf/method/{self.name}.yaml")
        if self.budget.metric == "units":
            raise TargetError(
                "target.units: attentions go, too, which have no units here; set target.macs, "
                "target.params or target.blocks"
            )
        if self.accounting == "paper" and self.budget.metric == "params":
            raise TargetError(
                f"target.{self.budget.metric}: method.accounting=paper counts MACs; set "
                "target.macs or target.blocks, or method.accounting=exact"
            )

    @property
    def budget(self) -> Target:
        """The target that is set, or the share of MACs that `strength` keeps."""
        return choose(self.strength, self.levels, self.target, metric="macs")

    def check(self, cost: Cost) -> None:
        """Raise TargetError if the candidates alone cannot meet the budget."""
        if not self.budget.is_identity:
            self._compressed(cost, self._eligible(cost.structure))

    def scorer(self, net: nn.Module) -> Trials:
        """Return the pass over the few images, and the trials."""
        return Trials(
            net,
            groups=self._candidates(structure(net)),
            sampling=self.sampling,
            reuse=self.reuse,
            regression=self.regression,
            ridges=(self.ridges.order, self.ridges.fold),
            width=self.trial.width,
            recipe=self.trial.training,
            front=self.tuning.front,
            metric_set=self.dream if self.metric_set == "dream" else None,
            distance=self.distance,
            seed=self.seed,
        )

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost) -> Plan:
        """Compress the candidates with the lowest scores, as many as the budget needs.

        The provenance has `trials`, the scores, by the first block of each candidate.
        """
        candidates = self._candidates(cost.structure)
        if BLOCKS in evidence.scores:
            found = dict(zip(candidates, evidence.scores[BLOCKS].tolist(), strict=True))
        else:
            _log.info("no images to try blocks on: they are taken in the network's order")
            found = {group: float(place) for place, group in enumerate(candidates)}
        branches = whole_blocks(cost.structure)
        if branches or BLOCKS not in evidence.scores:
            cheap = found
        else:
            cheap = {group: score / share_of(cost, group[0]) for group, score in found.items()}
        order = sorted(self._eligible(cost.structure), key=lambda group: cheap[group])
        widths, dropped = self._compressed(cost, order)
        edits: list[Drop | Keep] = [Drop(branch=block) for block in dropped if not branches]
        for block, width in widths.items():
            attention, mlp = branches[block]
            site = hidden_of(cost.structure, mlp)
            size = cost.structure.sites[site].size
            if block in dropped:
                edits.append(Drop(branch=attention))
            if width < size:
                scores = evidence.scores.get(site, torch.zeros(size))
                edits.append(Keep(site=site, index=best_of(scores, width)))
        provenance = {
            "method": self.name,
            "strength": self.strength,
            "accounting": self.accounting,
            "blocks": list(widths if branches else dropped),
            "widths": list(widths.values()),
            "trials": {group[0]: score for group, score in found.items()}
            if BLOCKS in evidence.scores
            else {},
        }
        return Plan(model={}, edits=tuple(edits), provenance=provenance)

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return last layers that do what the whole blocks did, or MLPs drawn anew."""
        if not evidence.moments:
            return {}
        ends = self._ends(structure(net))
        values: dict[str, Tensor] = {}
        if self.reuse == "none":
            generator = torch.Generator().manual_seed(self.seed)
            for keep in plan.keeps():
                mlp = keep.site.rpartition(".")[0]
                for name, tensor in compact.get_submodule(mlp).named_parameters():
                    values[f"{mlp}.{name}"] = (
                        nn.init.trunc_normal_(
                            torch.empty(tensor.shape), std=0.02, generator=generator
                        )
                        if tensor.ndim > 1
                        else torch.zeros(tensor.shape)
                    )
        elif self.regression:
            values |= solved(compact, plan, evidence, ends, self.ridges.fold)
        return values

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> Iterator[LightningModule]:
        """Yield regression and mimicking, group by group where `progressive`, at once where not.

        Between the phases of progressive compression the network has the groups so far; the others
        are the dense network's own until it is their turn.
        """
        described = structure(teacher)
        branches = whole_blocks(described)
        scored = {
            block: hidden_of(described, branches[block][1]) if branches else block
            for group in self._candidates(described)
            for block in group
        }
        candidates = [  # of the network that was scored, which an earlier run may have compressed
            group
            for group in self._candidates(described)
            if all(scored[block] in evidence.scores for block in group)
        ]
        scores = evidence.scores[BLOCKS].tolist()
        steps = [
            [
                block
                for block in group
                if not _same_shapes(student.get_submodule(block), teacher.get_submodule(block))
            ]
            for _, group in sorted(zip(scores, candidates, strict=True), key=lambda pair: pair[0])
        ]
        done = [block for step in steps for block in step]
        steps = [step for step in steps if step] if self.progressive else [done]
        compressed = {block: student.get_submodule(block) for block in done}
        tried = self._tried(teacher, evidence, candidates) if self.progressive else None
        for step in steps[1:]:
            for block in step:
                student.set_submodule(block, copy.deepcopy(teacher.get_submodule(block)))
        taken = tried is not None and _same_shapes(student, tried)
        if tried is not None and taken:  # the best trial is the first step, done already
            student.load_state_dict(tried.state_dict())
        ready: list[str] = []
        for step in steps:
            for block in step:
                student.set_submodule(block, compressed[block])
            ready += step
            if taken and step is steps[0]:
                done_in_the_trial = replace(self.tuning.training, epochs=0)
                yield Mimic(student, teacher, recipe=done_in_the_trial)
                continue
            if self.regression and self.reuse != "none" and branches:
                yield Refit(
                    student,
                    evidence=evidence,
                    sampling=self.sampling,
                    ridge=self.ridges.fold,
                    closing_ridge=self.ridges.closing,
                    branches=[branches[block][1] for block in step],
                )
            if self.tuning.training.epochs:
                yield Mimic(
                    student,
                    teacher,
                    recipe=self.tuning.training,
                    every=1.0 if self.tuning.mimic == "all" else 0.0,
                    pooled=self.tuning.pooled if self.tuning.mimic == "all" else 1.0,
                    frozen=frozen(student, ready, front=self.tuning.front, dense=teacher),
                )

    def _tried(
        self, teacher: nn.Module, evidence: Evidence, candidates: Sequence[Group]
    ) -> nn.Module | None:
        """Return the network of the best trial, if trials were trained, and of the dense one."""
        found = evidence.moments.get(CANDIDATE)
        if found is None:
            return None
        group = candidates[int(found["place"])]
        plan = plan_of_trial(teacher, group, evidence, self.trial.width)
        net = cut(teacher, plan)
        tensors = learnt(net)
        sizes = [tensor.numel() for tensor in tensors]
        if len(found["parameters"]) != sum(sizes):
            return None  # of a network that an earlier run had compressed
        for tensor, values in zip(tensors, torch.split(found["parameters"], sizes), strict=True):
            tensor.copy_(values.view_as(tensor))
        return net

    def _candidates(self, described: Structure) -> list[Group]:
        """Return the groups of blocks that may be compressed: none of them is spared."""
        first, last = self.spare
        order = [*blocks_of(described)]
        inner = set(order[first : len(order) - last])
        blocks = [block for block in whole_blocks(described) if block in inner]
        if not blocks:
            return [(block,) for block in lone_blocks(described) if block in inner]
        return groups_of(described, blocks, self.together)

    def _eligible(self, described: Structure) -> list[Group]:
        """Return the candidates that may be chosen: all, or those with a block that is asked for.

        Raises:
            ConfigError: there are none, or one of these blocks is in none.
        """
        if not whole_blocks(described):
            if not lone_blocks(described):
                raise ConfigError(
                    f"method={self.name}: the network has no blocks of an attention and an MLP to "
                    "compress, nor any that could go whole; method=fskd and cd cut channels"
                )
            for key, value, only in (
                ("accounting", self.accounting, "exact"),
                ("together", self.together, 1),
                ("extra", self.extra, 0),
            ):
                if value != only:
                    raise ConfigError(
                        f"method.{key}={value}: this network has no attentions, and loses whole "
                        f"blocks, one after the other; set method.{key}={only}"
                    )
        candidates = self._candidates(described)
        if not candidates:
            raise ConfigError(
                f"method.together={self.together}, method.spare={list(self.spare)}: no stage has "
                f"{self.together} successive blocks that are not spared; set less of either"
            )
        known = [block for group in candidates for block in group]
        wrong = sorted(set(self.only or ()) - set(known))
        if wrong:
            raise ConfigError(
                f"method.only: {', '.join(wrong[:3])}: expected some of {', '.join(known)}"
            )
        asked = set(known if self.only is None else self.only)
        return [group for group in candidates if not asked.isdisjoint(group)]

    def _ends(self, described: Structure) -> dict[str, str]:
        ends = {branch.name: branch.ends[0] for branch in described.branches}
        branches = whole_blocks(described)
        return {
            block: ends[branches[block][1]]
            for group in self._candidates(described)
            for block in group
            if block in branches
        }

    def _compressed(self, cost: Cost, order: Sequence[Group]) -> tuple[dict[str, int], list[str]]:
        """Return the hidden width of each compressed block, and those that lose their attention.

        Where blocks go whole, there are no widths, and these are the blocks that go.

        Raises:
            TargetError: the candidates, all of them compressed, are above the budget.
        """
        if not whole_blocks(cost.structure):
            return {}, fewest(cost, self.budget, [block for (block,) in order])
        if self.accounting == "paper":
            widths = paper_widths(cost, self.budget, order)
            return widths, list(widths)
        return dense_widths(cost, self.budget, order, extra=self.extra)


def _same_shapes(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same parameters, but for their values."""
    first, second = (
        [(name, tensor.shape) for name, tensor in net.named_parameters()] for net in (one, other)
    )
    return first == second
