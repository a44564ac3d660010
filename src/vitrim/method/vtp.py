"""VTP, Vision Transformer Pruning (arXiv 2104.08500): L1-trained gates on dimensions.

Every block has four gates (four vectors a, 7 D numbers in all): on the input of q, k and v, on
the attention output before proj, on the input of fc1, and on the hidden units before fc2. They are
learned together with the weights, L = L_CE + lambda * sum |a|. Then the units with the smallest |a|
are removed, and the smaller network is fine-tuned without the L1 term. The equations are taken from
a summary of the paper, not from its full text.

Where we differ from the paper, or where it is silent:
  * The gate of a kept unit is folded into its weights instead of being set to 1, so that the cut
    changes nothing but what it removes.
  * The gates multiply weight columns, W diag(a), which is the same function as multiplying the
    activations, X diag(a), and saves their memory and most of the time.
  * One threshold over all gates (`scope: global`) is our choice; the paper does not say.
  * Removing attention outputs also removes their value rows, any in every head, or the same number
    in each (`even_heads`). The params and FLOPs of the paper's rows fit a network that keeps these
    rows (DeiT-B: 67.3 M and 13.8 G, 48.0 M and 10.0 G; 197 MACs per weight that is removed, and no
    fewer in the products of attention): at equal params ours has 1 to 2 % fewer MACs.
  * Gates have their own learning rate (`gate_lr`).
  * Without training all gates are equal and rank nothing: units then get random scores (`seed`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call

from vitrim.budget.cost import Cost
from vitrim.budget.target import CountedMetric, Target
from vitrim.budget.trim import Scope, trim
from vitrim.errors import is_count, is_rate, require
from vitrim.method import Granularity
from vitrim.network import structure
from vitrim.network.attention import own_name
from vitrim.network.structure import Structure
from vitrim.plan import Evidence, Keep, Proposal
from vitrim.trainer.classify import Classify, log_hits
from vitrim.trainer.phase import Phase, ResumePoint
from vitrim.trainer.recipe import Recipe, adamw_cosine, images_per_step

_log = logging.getLogger(__name__)
METRICS = ("macs", "params", "units")
"""What `levels` may be fractions of."""
_LEAST_MOVE = 0.1
"""Of the way of a gate from 1 to 0: gates that cannot move as far are warned of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VTP:
    """L1-gated pruning of dimensions; every number comes from conf/method/vtp.yaml."""

    levels: Sequence[float]
    scope: Scope
    round_to: int
    even_heads: bool
    l1: float
    gate_lr: float
    gating: Recipe
    fine_tuning: Recipe
    metric: CountedMetric = "units"
    seed: int = 0
    granularity: ClassVar[Granularity] = "unit"

    def __post_init__(self) -> None:
        require(
            "method",
            self,
            ("metric", self.metric in METRICS, "macs, params or units"),
            ("scope", self.scope in ("global", "site"), "global or site"),
            ("round_to", is_count(self.round_to), "a whole number from 1 on"),
            ("even_heads", isinstance(self.even_heads, bool), "true or false"),
            ("l1", is_rate(self.l1), "a number from 0 on"),
            ("gate_lr", is_rate(self.gate_lr), "a number from 0 on"),
        )

    def check(self, cost: Cost, target: Target) -> None:
        """Raise TargetError if removing gated dimensions cannot meet the target."""
        sites = cost.structure.sites
        equal = {site: torch.ones(sites[site].size) for site in gates_of(cost.structure).values()}
        self._trim(cost, equal, target)

    def gates(self, described: Structure) -> dict[str, str]:
        """Return the weights whose columns have gates: parameter name -> site name."""
        return gates_of(described)

    @property
    def labelled_training(self) -> tuple[Recipe, ...]:
        """Both trainings: what the gates were trained with, and the fine-tuning."""
        return (self.gating, self.fine_tuning)

    def scorer(self, net: nn.Module) -> GateTraining:
        """Return step 1: training with gates and L1."""
        return GateTraining(net, recipe=self.gating, l1=self.l1, gate_lr=self.gate_lr)

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Remove the units with the smallest |a| (step 2); random ones if no gate was trained."""
        if not _rank_nothing(evidence.scores):
            return Proposal(edits=self._trim(cost, evidence.scores, target))
        _log.info("all gates are equal: units are ranked by random numbers (seed %d)", self.seed)
        scores = _random_scores(evidence.scores, self.seed)
        return Proposal(edits=self._trim(cost, scores, target), notes={"criterion": "random"})

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> list[Phase]:
        """Return step 3: the same training without gates and L1."""
        return [Classify(student, recipe=self.fine_tuning, n_classes=n_classes)]

    def _trim(self, cost: Cost, scores: Mapping[str, Tensor], target: Target) -> tuple[Keep, ...]:
        return trim(
            cost,
            scores,
            target,
            scope=self.scope,
            round_to=self.round_to,
            even_heads=self.even_heads,
        )


class GateTraining(LightningModule):
    """Train a network together with one gate per unit, starting at 1, under an L1 penalty."""

    calibration_images = None
    resumes_at: ResumePoint = "batch"
    trains = True
    best_by = "top1"

    folded: Tensor

    def __init__(self, net: nn.Module, *, recipe: Recipe, l1: float, gate_lr: float) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.epochs = recipe.epochs
        self.clip_norm = recipe.clip_norm
        self.l1 = l1
        self.gate_lr = gate_lr
        self.settings: dict[str, object] = {
            "recipe": recipe.settings(),
            "l1": l1,
            "gate_lr": gate_lr,
        }
        described = structure(net)
        self._gated = gates_of(described)
        self._sites = {
            site: index for index, site in enumerate(dict.fromkeys(self._gated.values()))
        }
        self.gates = nn.ParameterList(
            torch.ones(described.sites[site].size) for site in self._sites
        )
        self.register_buffer("folded", torch.tensor(False))

    @property
    def networks(self) -> list[nn.Module]:
        """The network, which is called with gated weights."""
        return [self.net]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes) through the gated weights."""
        weights = {
            own_name(self.net, name): self._scaled(name, site) for name, site in self._gated.items()
        }
        logits: Tensor = functional_call(self.net, weights, (images,))
        return logits

    def _scaled(self, name: str, site: str) -> Tensor:
        """Return a weight (out, in, ...) whose columns are multiplied by their gates (in,)."""
        weight = self.net.get_parameter(name)
        gates = self.gates[self._sites[site]].view(-1, *(1,) * (weight.ndim - 2))
        return torch.mul(weight, gates)

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Return the logits; the penalty reads the gates, on which these depend as well."""
        return [self(images)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss L_CE + l1 * sum |a|."""
        images, targets = batch
        loss = F.cross_entropy(self(images), targets)
        penalty = torch.cat([gate.abs() for gate in self.gates]).sum()
        self.log_dict({"loss": loss, "gates": penalty})
        return loss + self.l1 * penalty

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log top-1 and top-5 of the gated network on one batch, in percent."""
        log_hits(self, self(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the weights and, without decay and with their own rate, the gates.

        Both rates are scaled to the batch as `Recipe` says. Logs a warning if the rate of the gates
        is too small for them to leave 1.
        """
        steps = int(self.trainer.estimated_stepping_batches)
        batch = images_per_step(self.trainer)
        gate_lr = self.gate_lr * self.recipe.lr_factor(batch)
        if longest_move(gate_lr, steps) < _LEAST_MOVE:
            _log.warning(
                "method.gate_lr=%g: in %d steps of %d images, at a rate of %.3g, a gate moves by "
                "%.2g at most, on its way from 1 to 0: gates hardly tell units apart; raise "
                "method.gate_lr (to %.2g, say) or method.gating.epochs",
                self.gate_lr,
                steps,
                batch,
                gate_lr,
                longest_move(gate_lr, steps),
                1 / (self.recipe.lr_factor(batch) * steps),
            )
        gates = {"params": list(self.gates), "lr": gate_lr, "weight_decay": 0.0}
        return adamw_cosine(self.net, self.recipe, self.trainer, extra=[gates])

    @torch.no_grad()
    def evidence(self) -> Evidence:
        """Return |a| per site, and fold the gates into the weights once."""
        if not self.folded:
            for name, site in self._gated.items():
                self.net.get_parameter(name).copy_(self._scaled(name, site))
            self.folded.fill_(True)
        scores = {
            site: self.gates[index].detach().abs().cpu() for site, index in self._sites.items()
        }
        return Evidence(scores=scores)


def longest_move(lr: float, steps: int) -> float:
    """Return how far a parameter moves at most: a step is about the rate, half of `lr` on average.

    >>> round(longest_move(6.25e-6, 100 * 1251), 2)  # ImageNet-1K, 100 epochs, 1024 images a step
    0.39
    """
    return lr * steps / 2


def _rank_nothing(scores: Mapping[str, Tensor]) -> bool:
    """Whether all units have the same score."""
    every = torch.cat([score.flatten() for score in scores.values()])
    return bool((every == every[:1]).all())


def _random_scores(scores: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a random number for every unit, by site."""
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.rand(len(score), generator=generator) for site, score in scores.items()}


def gates_of(described: Structure) -> dict[str, str]:
    """Return the weights whose input columns belong to one site: parameter name -> site name."""
    return {
        f"{layer.name}.weight": part.site
        for layer in described.layers
        for part in layer.inp[:1]
        if part.site is not None and not described.sites[part.site].locked_reason
    }
