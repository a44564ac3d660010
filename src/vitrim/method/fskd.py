"""FSKD, few-sample knowledge distillation (arXiv 1812.01839): align layers by least squares.

Units with the smallest L1 norm of their weights are removed. Then, layer by layer in the network's
order, on one batch of unlabelled images, a 1x1 convolution Q is added after the layer and solved in
closed form. X_S is the output of the cut network's layer (whose earlier layers are already aligned)
and X_T that of the dense network's, at the rows that were kept:

    Q = argmin || X_S Q - X_T ||^2

Q is a linear map of channels, so it is absorbed into the layer before it: W <- Q^T W, b <- Q^T b.
There is no gradient and there are no labels. After a description of the authors' code
(LTH14/FSKD), not the code itself.

Where we differ from the paper, or where it is silent:
  * A ridge keeps Q near the identity, where the authors' lstsq takes the smallest Q: with few
    images a layer that needs no correction keeps its weights.
  * Up to `samples_per_image` positions of a feature map are used, evenly spaced.
  * A depthwise convolution cannot absorb a map between channels: its Q is diagonal.
  * In a transformer, the units are hidden units of MLPs, and fc1 and fc2 are the layers.
  * Only layers of cut branches are aligned; the others keep their weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.budget.trim import Scope, trim
from vitrim.closed_form.importance import importance
from vitrim.closed_form.reconstruction import ridge_solve
from vitrim.errors import is_count, is_positive, require
from vitrim.method import Granularity
from vitrim.network import structure
from vitrim.network.attention import parameters_of
from vitrim.network.computing import on_device
from vitrim.network.structure import Kind, Layer, Structure, cuttable_channels
from vitrim.network.survivors import index_of, resolve
from vitrim.plan import Evidence, Keep, Plan, Proposal
from vitrim.trainer.collect import Collect

SITES: Mapping[str, Kind] = {"mlp": "hidden", "channels": "channels"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FSKD:
    """L1 norms and absorbed 1x1 convolutions; every number comes from conf/method/fskd.yaml."""

    levels: Sequence[float]
    sites: Sequence[str]
    scope: Scope
    round_to: int
    images: int
    samples_per_image: int
    ridge: float
    metric: ClassVar[Metric] = "units"
    granularity: ClassVar[Granularity] = "unit"

    def __post_init__(self) -> None:
        count = "a whole number from 1 on"
        require(
            "method",
            self,
            (
                "sites",
                bool(self.sites) and set(self.sites) <= SITES.keys(),
                f"a list of {', '.join(SITES)}",
            ),
            ("scope", self.scope in ("global", "site"), "global or site"),
            ("round_to", is_count(self.round_to), count),
            ("images", is_count(self.images), count),
            ("samples_per_image", is_count(self.samples_per_image), count),
            ("ridge", is_positive(self.ridge), "a number above 0"),
        )

    def check(self, cost: Cost, target: Target) -> None:
        """Raise TargetError if the network has none of the units, or too few for the target."""
        names = cuttable_channels(cost.structure, [SITES[name] for name in self.sites])
        if not names:
            raise TargetError(f"method.sites={[*self.sites]}: this network has none of them")
        sites = cost.structure.sites
        self._trim(cost, {name: torch.ones(sites[name].size) for name in names}, target)

    def scorer(self, net: nn.Module) -> Collect:
        """Return the phase that keeps the batch of images."""
        return Collect(net, images=self.images)

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Remove the units with the smallest L1 norms."""
        sites = cost.structure.sites
        scores = {
            name: importance(
                net, cost.structure, {}, sites[name], criterion="magnitude", ridge=0.0, seed=0
            )
            for name in cuttable_channels(cost.structure, [SITES[name] for name in self.sites])
        }
        return Proposal(edits=self._trim(cost, scores, target))

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the weights and biases of aligned layers."""
        if evidence.images is None:
            return {}
        return aligned_weights(
            net,
            compact,
            plan,
            evidence.images,
            samples_per_image=self.samples_per_image,
            ridge=self.ridge,
        )

    def _trim(self, cost: Cost, scores: Mapping[str, Tensor], target: Target) -> tuple[Keep, ...]:
        return trim(cost, scores, target, scope=self.scope, round_to=self.round_to)


@torch.no_grad()
def aligned_weights(
    net: nn.Module,
    compact: nn.Module,
    plan: Plan,
    images: Tensor,
    *,
    samples_per_image: int,
    ridge: float,
) -> dict[str, Tensor]:
    """Return new values of parameters of `compact`, by name; neither network is changed.

    Args:
        net: the dense network.
        compact: `cut(net, plan)`.
        plan: what was cut.
        images: (n, C, H, W).
        samples_per_image: positions of a feature map, or tokens; all if there are fewer.
        ridge: that keeps Q near the identity, relative to the mean square of the layer's outputs.
    """
    described = structure(net)
    survivors = resolve(described, plan)
    layers = _layers(net, described, plan)
    dense, small = (copy.deepcopy(module).eval() for module in (net, compact))
    targets: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def keep_target(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            targets[layer.name] = _rows(module, output, samples_per_image)

        return hook

    def align(layer: Layer) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            target = targets.pop(layer.name)[:, index_of(layer.out, survivors)]
            x = _rows(module, output, samples_per_image)
            q = _map(x.double(), target.double(), ridge, diagonal=not layer.inp).to(output)
            for name, tensor in parameters_of(module).items():
                values[f"{layer.name}.{name}"] = (q.T @ tensor.reshape(len(q), -1)).view_as(tensor)
            axis = _axis(module)
            return (output.movedim(axis, -1) @ q).movedim(-1, axis)

        return hook

    for network, make_hook in ((dense, keep_target), (small, align)):
        for layer in layers:
            network.get_submodule(layer.name).register_forward_hook(make_hook(layer))
        network(images.to(next(network.parameters())))
    return values


def _layers(net: nn.Module, described: Structure, plan: Plan) -> list[Layer]:
    """Return the layers, without norms, of the branches in which something is cut."""
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
    """Return the axis of the channels in the output of a layer."""
    return 1 if isinstance(module, nn.Conv2d) else -1


def _rows(module: nn.Module, output: Tensor, samples_per_image: int) -> Tensor:
    """Return outputs at evenly spaced positions of every image, (rows, channels)."""
    positions = output.movedim(_axis(module), -1).flatten(1, -2)
    n_positions = positions.shape[1]
    n_samples = min(samples_per_image, n_positions)
    sampled = torch.arange(n_samples) * n_positions // n_samples
    return positions[:, sampled].flatten(0, 1)


@on_device
def _map(x: Tensor, target: Tensor, ridge: float, *, diagonal: bool) -> Tensor:
    """Return Q, (channels, channels), by least squares around the identity.

    Args:
        x: X_S, (rows, channels).
        target: X_T, the same shape.
        ridge: relative to the mean square of x.
        diagonal: whether every channel is mapped on its own.
    """
    if diagonal:
        squares = x.square().sum(0)
        level = (ridge * squares.mean()).clamp_min(torch.finfo(x.dtype).tiny)
        return torch.diag(1 + (x * (target - x)).sum(0) / (squares + level))
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return identity + ridge_solve(x.T @ x, x.T @ (target - x), ridge)
