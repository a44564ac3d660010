"""CD, cross distillation (arXiv 1911.09450): few images, layer by layer, two inputs to each layer.

W_T is a layer of the dense network, W_S the same layer with fewer input channels, X^T and X^S what
enters it in the dense and in the pruned network. The loss of a layer is

    mu ||W_S X^T - W_T X^T||^2  (correction)  +  (1 - mu) ||W_S X^S - W_T X^S||^2  (imitation)

and input channels go by a proximal gradient: after every step the norms of all channels' weights
are reduced so far that as many are zero as the schedule wants, from none to all but one.

Where we differ from the paper (equations and schedule from the authors' code, as noted by others):
  * The loss is quadratic in W_S. With G = mu X^T X^T' + (1 - mu) X^S X^S' and the channels K kept,
    R removed, its minimum is W_T,K + W_T,R G_RK G_KK^-1, which we take (with a ridge) instead of
    training by Adam; the proximal gradient, too, sees images by G only, in plain steps.
  * Channels are ranked on the dense network, where X^S = X^T, by when the falling number takes
    them; the budget then decides how many go. So one ranking serves all strengths.
  * Of an image, up to `positions` places of a layer's output are looked at, evenly spaced.
  * In a transformer the channels are hidden units of MLPs, and fc2 is the layer; biases stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError, check_strength, choose
from vitrim.budget.trim import Scope, trim
from vitrim.closed_form.importance import reader_of, score
from vitrim.closed_form.reconstruction import regress
from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.network import structure
from vitrim.network.structure import Structure
from vitrim.network.survivors import index_of, removed_of, resolve
from vitrim.plan import Evidence, Keep, Plan
from vitrim.trainer.classify import Classify
from vitrim.trainer.collect import Collect
from vitrim.trainer.recipe import Recipe

SITES = {"mlp": "mlp.hidden", "channels": ".channels"}
_CHUNK = 8  # images whose patches are in memory at once


@dataclass(frozen=True, kw_only=True, slots=True)
class CD:
    """Cross distillation with channel sparsity; every number comes from conf/method/cd.yaml."""

    strength: float | None
    target: Mapping[str, Any]
    levels: Sequence[float]
    sites: Sequence[str]
    scope: Scope
    round_to: int
    images: int
    positions: int
    mu: float
    steps: int
    ridge: float
    fine_tuning: Recipe

    def __post_init__(self) -> None:
        require(
            "method",
            self,
            (
                "sites",
                bool(self.sites) and set(self.sites) <= SITES.keys(),
                f"a list of {', '.join(SITES)}",
            ),
            ("scope", self.scope in ("global", "site"), "global or site"),
            ("round_to", is_count(self.round_to), "a whole number from 1 on"),
            ("images", is_count(self.images), "a whole number from 1 on"),
            ("positions", is_count(self.positions), "a whole number from 1 on"),
            ("mu", is_rate(self.mu) and self.mu <= 1, "a number from 0 to 1"),
            ("steps", is_count(self.steps), "a whole number from 1 on"),
            ("ridge", is_positive(self.ridge), "a number above 0"),
        )
        check_strength(self.strength, self.levels, where="conf/method/cd.yaml")
        choose(self.strength, self.levels, self.target, metric="units")

    @property
    def budget(self) -> Target:
        """The target that is set, or the share of channels that `strength` keeps."""
        return choose(self.strength, self.levels, self.target, metric="units")

    def check(self, cost: Cost) -> None:
        """Raise TargetError if the network has none of the units, or too few for the budget."""
        names = self._of(cost.structure)
        if not names:
            raise TargetError(f"method.sites={[*self.sites]}: this network has none of them")
        sites = cost.structure.sites
        self._trim(cost, {name: torch.ones(sites[name].size) for name in names})

    def scorer(self, net: nn.Module) -> Collect:
        """Return the phase that takes the images."""
        return Collect(net, images=self.images)

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost) -> Plan:
        """Remove the channels that the proximal gradient takes first; by L1 without images."""
        described, names = cost.structure, self._of(cost.structure)
        if evidence.moments:
            readers = {name: reader_of(described, name).name for name in names}
            pixels = evidence.moments["images"]["pixels"]
            found = grams(net, [*readers.values()], pixels, self.positions)
            scores = {
                name: lasting(net.get_parameter(f"{at}.weight"), found[at], steps=self.steps)
                for name, at in readers.items()
            }
        else:
            scores = {
                name: score(
                    net,
                    described,
                    {},
                    described.sites[name],
                    criterion="magnitude",
                    ridge=self.ridge,
                    seed=0,
                )
                for name in names
            }
        edits = self._trim(cost, scores)
        return Plan(model={}, edits=edits, provenance={"method": "cd", "strength": self.strength})

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the weights that minimise the loss, layer by layer."""
        if not evidence.moments:
            return {}
        return crossed(
            net,
            plan,
            evidence.moments["images"]["pixels"],
            positions=self.positions,
            mu=self.mu,
            ridge=self.ridge,
        )

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> list[LightningModule]:
        """Return the fine-tuning."""
        if not self.fine_tuning.epochs:
            return []
        return [Classify(student, recipe=self.fine_tuning, n_classes=n_classes)]

    def _of(self, described: Structure) -> list[str]:
        """Return the names of the sites of the chosen kinds, in network order."""
        endings = tuple(SITES[kind] for kind in self.sites)
        return [
            name
            for name, site in described.sites.items()
            if name.endswith(endings) and not site.locked
        ]

    def _trim(self, cost: Cost, scores: Mapping[str, Tensor]) -> tuple[Keep, ...]:
        return trim(cost, scores, self.budget, scope=self.scope, round_to=self.round_to)


@torch.no_grad()
def crossed(
    net: nn.Module, plan: Plan, pixels: Tensor, *, positions: int, mu: float, ridge: float
) -> dict[str, Tensor]:
    """Return the weights of `cut(net, plan)`, by name, of layers that lose input channels.

    Args:
        net: the dense network, which is not changed.
        plan: what is cut.
        pixels: images, (n, C, H, W).
        positions: of a layer's output, per image; all where there are fewer.
        mu: what correction counts beside imitation, 0 to 1.
        ridge: that holds the weights near the dense ones, relative to the mean square of inputs.
    """
    described = structure(net)
    survivors = resolve(described, plan)
    readers = {
        layer.name: (layer, keep.site)
        for keep in plan.keeps()
        for layer in (reader_of(described, keep.site),)
    }
    of_dense = grams(net, [*readers], pixels, positions)
    pruned = copy.deepcopy(net).eval()  # of the dense shapes: X^S has all channels
    values: dict[str, Tensor] = {}

    def solve(name: str) -> Callable[..., None]:
        layer, site = readers[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            gram = mu * of_dense.pop(name) + (1 - mu) * _gram(module, args[0], positions)
            weight, kept = module.get_parameter("weight"), survivors[site]
            found = _minimum(weight, gram, kept, ridge)
            values[f"{name}.weight"] = found[index_of(layer.out, survivors)]
            weight.zero_()
            weight[:, kept] = found

        return hook

    for name in readers:
        pruned.get_submodule(name).register_forward_pre_hook(solve(name))
    pruned(pixels.to(next(pruned.parameters())))
    return values


@torch.no_grad()
def grams(
    net: nn.Module, layers: Sequence[str], pixels: Tensor, positions: int
) -> dict[str, Tensor]:
    """Return X X' of what enters each layer, float64, (columns, columns), one column per weight."""
    twin = copy.deepcopy(net).eval()
    found: dict[str, Tensor] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = _gram(module, args[0], positions)

        return hook

    for name in layers:
        twin.get_submodule(name).register_forward_pre_hook(look(name))
    twin(pixels.to(next(twin.parameters())))
    return found


@torch.no_grad()
def lasting(weight: Tensor, gram: Tensor, *, steps: int) -> Tensor:
    """Return how long each input channel lasts under the proximal gradient, higher is kept.

    Args:
        weight: W_T, (out, channels) or (out, channels, height, width).
        gram: of the layer's inputs, (columns, columns).
        steps: in which the number of channels falls from all to one.
    """
    dense = weight.flatten(1).double()
    channels = weight.shape[1]
    rate = 1 / _largest(gram)
    now = dense.clone()
    lasts = torch.zeros(channels, dtype=torch.float64)
    for step in range(1, steps + 1):
        now -= rate * (now - dense) @ gram
        grouped = now.view(len(now), channels, -1)
        norms = grouped.square().sum((0, 2)).sqrt()
        order = norms.argsort(descending=True, stable=True)
        left = channels - (channels - 1) * step // steps
        threshold = norms[order[left]] if left < channels else norms.new_zeros(())
        shrunk = (1 - threshold / norms.clamp_min(1e-300)).clamp_min(0.0)
        shrunk[order[left:]] = 0.0
        now = (grouped * shrunk[:, None]).flatten(1)
        share = norms / norms.max().clamp_min(1e-300)  # among those of one step, the larger stays
        lasts = torch.where(shrunk > 0, step + share / 2, lasts)
    return lasts


def _largest(gram: Tensor) -> float:
    """Return (nearly, and not less than) the largest eigenvalue, by power iteration."""
    vector = torch.ones(len(gram), dtype=gram.dtype)
    for _ in range(30):
        vector = F.normalize(gram @ vector, dim=0)
    return max(1.1 * float(vector @ gram @ vector), 1e-300)


def _minimum(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Return the best weights (out, kept, ...) for a layer of (out, channels, ...) to have left."""
    flat = weight.flatten(1).double()
    area = flat.shape[1] // weight.shape[1]
    columns = (area * kept[:, None] + torch.arange(area)).flatten()
    gone = removed_of(flat.shape[1], columns)
    cross = gram[columns][:, gone] @ flat[:, gone].T
    found = flat[:, columns] + regress(gram[columns][:, columns], cross, ridge).T
    return found.view(len(weight), len(kept), *weight.shape[2:]).to(weight)


def _gram(module: nn.Module, x: Tensor, positions: int) -> Tensor:
    """Return X X' of the patches that enter `module` at some places, float64."""
    total: Tensor | None = None
    for chunk in torch.split(x, _CHUNK):
        rows = _patches(module, chunk)
        places = rows.shape[1]
        taken = torch.arange(min(positions, places)) * places // min(positions, places)
        flat = rows[:, taken].flatten(0, 1)
        part = (flat.T @ flat).double()
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """Return what each output is made of, (images, places, columns)."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(1, -2)
    assert isinstance(module.padding, tuple)
    found = F.unfold(
        x,
        module.kernel_size,
        dilation=module.dilation,
        padding=module.padding,
        stride=module.stride,
    )
    return found.transpose(1, 2)
