"""FSKD, few-sample knowledge distillation (arXiv 1812.01839): align layers by least squares.

Units with the smallest L1 norm of their weights go. Then, layer by layer in the network's order, on
one batch of unlabelled images, a 1x1 convolution Q is put behind the layer and solved in closed
form, X_S being what the cut network's layer gives (its own earlier layers aligned already) and X_T
what the dense network's gives for the same rows:

    Q = argmin || X_S Q - X_T ||^2

Q is a linear map of channels, so it is absorbed into the layer before it: W <- Q^T W, b <- Q^T b.
No gradient, no labels. After a description of the authors' code (LTH14/FSKD), not the code itself.

Where we differ from the paper, or where it does not reach:
  * Q is held near the identity by a ridge, where the authors' lstsq takes the smallest Q: with few
    images a layer that needs no correction keeps its weights.
  * Of an image, up to `positions` places of a map are looked at, evenly spaced.
  * A depthwise convolution cannot absorb a map between channels: its Q is diagonal.
  * In a transformer, the units are hidden ones of MLPs, and fc1 and fc2 are the layers.
  * Only layers of cut branches are aligned; others are as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError, check_strength, choose
from vitrim.budget.trim import Scope, trim
from vitrim.closed_form.importance import score
from vitrim.closed_form.reconstruction import regress
from vitrim.errors import is_count, is_positive, require
from vitrim.network import structure
from vitrim.network.structure import Layer, Structure
from vitrim.network.survivors import index_of, resolve
from vitrim.plan import Evidence, Keep, Plan
from vitrim.trainer.collect import Collect

SITES = {"mlp": "mlp.hidden", "channels": ".channels"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FSKD:
    """L1 norms and absorbed 1x1 convolutions; every number comes from conf/method/fskd.yaml."""

    strength: float | None
    target: Mapping[str, Any]
    levels: Sequence[float]
    sites: Sequence[str]
    scope: Scope
    round_to: int
    images: int
    positions: int
    ridge: float

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
            ("ridge", is_positive(self.ridge), "a number above 0"),
        )
        check_strength(self.strength, self.levels, where="conf/method/fskd.yaml")
        choose(self.strength, self.levels, self.target, metric="units")

    @property
    def budget(self) -> Target:
        """The target that is set, or the share of units that `strength` keeps."""
        return choose(self.strength, self.levels, self.target, metric="units")

    def check(self, cost: Cost) -> None:
        """Raise TargetError if the network has none of the units, or too few for the budget."""
        names = self._of(cost.structure)
        if not names:
            raise TargetError(f"method.sites={[*self.sites]}: this network has none of them")
        sites = cost.structure.sites
        self._trim(cost, {name: torch.ones(sites[name].size) for name in names})

    def scorer(self, net: nn.Module) -> Collect:
        """Return the phase that takes the one batch of images."""
        return Collect(net, images=self.images)

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost) -> Plan:
        """Remove the units with the smallest L1 norms."""
        sites = cost.structure.sites
        scores = {
            name: score(
                net, cost.structure, {}, sites[name], criterion="magnitude", ridge=0.0, seed=0
            )
            for name in self._of(cost.structure)
        }
        edits = self._trim(cost, scores)
        return Plan(model={}, edits=edits, provenance={"method": "fskd", "strength": self.strength})

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the weights and biases of aligned layers."""
        if not evidence.moments:
            return {}
        pixels = evidence.moments["images"]["pixels"]
        return aligned(net, compact, plan, pixels, positions=self.positions, ridge=self.ridge)

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> list[LightningModule]:
        """Return nothing: the alignment is all."""
        return []

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
def aligned(
    net: nn.Module, compact: nn.Module, plan: Plan, pixels: Tensor, *, positions: int, ridge: float
) -> dict[str, Tensor]:
    """Return new values of parameters of `compact`, by name; neither network is changed.

    Args:
        net: the dense network.
        compact: `cut(net, plan)`.
        plan: what was cut.
        pixels: images, (n, C, H, W).
        positions: of a map, or tokens, per image; all where there are fewer.
        ridge: that holds Q near the identity, relative to the mean square of the layer's outputs.
    """
    described = structure(net)
    survivors = resolve(described, plan)
    layers = _layers(net, described, plan)
    dense, small = (copy.deepcopy(module).eval() for module in (net, compact))
    aims: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def look(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            aims[layer.name] = _rows(module, output, positions)

        return hook

    def align(layer: Layer) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            aim = aims.pop(layer.name)[:, index_of(layer.out, survivors)]
            x = _rows(module, output, positions)
            q = _map(x.double(), aim.double(), ridge, diagonal=not layer.inp).to(output)
            for name, tensor in module.named_parameters(recurse=False):
                values[f"{layer.name}.{name}"] = (q.T @ tensor.reshape(len(q), -1)).view_as(tensor)
            axis = _axis(module)
            return (output.movedim(axis, -1) @ q).movedim(-1, axis)

        return hook

    for network, make in ((dense, look), (small, align)):
        for layer in layers:
            network.get_submodule(layer.name).register_forward_hook(make(layer))
        network(pixels.to(next(network.parameters())))
    return values


def _layers(net: nn.Module, described: Structure, plan: Plan) -> list[Layer]:
    """Return the layers, norms left out, of the branches in which something is cut."""
    sites = {keep.site for keep in plan.keeps()}
    branches = {
        layer.branch
        for layer in described.layers
        for part in (*layer.out, *layer.inp)
        if part.site in sites
    }
    return [
        layer
        for layer in described.layers
        if layer.branch in branches and net.get_parameter(f"{layer.name}.weight").ndim > 1
    ]


def _axis(module: nn.Module) -> int:
    """Return the axis of the channels in what a layer gives."""
    return 1 if isinstance(module, nn.Conv2d) else -1


def _rows(module: nn.Module, output: Tensor, positions: int) -> Tensor:
    """Return outputs at up to `positions` evenly spaced places of every image, (rows, channels)."""
    flat = output.movedim(_axis(module), -1).flatten(1, -2)
    places = flat.shape[1]
    taken = torch.arange(min(positions, places)) * places // min(positions, places)
    return flat[:, taken].flatten(0, 1)


def _map(x: Tensor, aim: Tensor, ridge: float, *, diagonal: bool) -> Tensor:
    """Return Q, (channels, channels), by least squares around the identity.

    Args:
        x: X_S, (rows, channels).
        aim: X_T, the same shape.
        ridge: relative to the mean square of x.
        diagonal: whether every channel has to be mapped by itself.
    """
    if diagonal:
        squares = x.square().sum(0)
        level = (ridge * squares.mean()).clamp_min(torch.finfo(x.dtype).tiny)
        return torch.diag(1 + (x * (aim - x)).sum(0) / (squares + level))
    return torch.eye(x.shape[1], dtype=x.dtype) + regress(x.T @ x, x.T @ (aim - x), ridge)
