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
    in each (`even_heads`).
  * Gates have their own learning rate (`gate_lr`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call

from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target
from vitrim.budget.trim import Scope, trim
from vitrim.errors import is_count, is_rate, require
from vitrim.method import Granularity
from vitrim.network import structure
from vitrim.network.structure import Structure
from vitrim.plan import Evidence, Keep, Proposal
from vitrim.trainer.classify import Classify
from vitrim.trainer.phase import Phase, ResumePoint
from vitrim.trainer.recipe import Recipe, adamw_cosine


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
    metric: ClassVar[Metric] = "units"
    granularity: ClassVar[Granularity] = "unit"

    def __post_init__(self) -> None:
        require(
            "method",
            self,
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

    def scorer(self, net: nn.Module) -> GateTraining:
        """Return step 1: training with gates and L1."""
        return GateTraining(net, recipe=self.gating, l1=self.l1, gate_lr=self.gate_lr)

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Remove the units with the smallest |a| (step 2)."""
        return Proposal(edits=self._trim(cost, evidence.scores, target))

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
            "recipe": asdict(recipe),
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

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, classes) through the gated weights."""
        weights = {name: self._scaled(name, site) for name, site in self._gated.items()}
        logits: Tensor = functional_call(self.net, weights, (images,))
        return logits

    def _scaled(self, name: str, site: str) -> Tensor:
        """Return a weight (out, in, ...) whose columns are multiplied by their gates (in,)."""
        weight = self.net.get_parameter(name)
        gates = self.gates[self._sites[site]].view(-1, *(1,) * (weight.ndim - 2))
        return torch.mul(weight, gates)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss L_CE + l1 * sum |a|."""
        images, targets = batch
        loss = F.cross_entropy(self(images), targets)
        penalty = torch.cat([gate.abs() for gate in self.gates]).sum()
        self.log_dict({"loss": loss, "gates": penalty}, prog_bar=True)
        return loss + self.l1 * penalty

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the weights and, without decay and with their own rate, the gates."""
        steps = int(self.trainer.estimated_stepping_batches)
        gates = {"params": list(self.gates), "lr": self.gate_lr, "weight_decay": 0.0}
        return adamw_cosine(self.net, self.recipe, steps=steps, extra=[gates])

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


def gates_of(described: Structure) -> dict[str, str]:
    """Return the weights whose input columns belong to one site: parameter name -> site name."""
    return {
        f"{layer.name}.weight": part.site
        for layer in described.layers
        for part in layer.inp[:1]
        if part.site is not None and not described.sites[part.site].locked_reason
    }
