"""CD, cross distillation (arXiv 1911.09450): few images, layer by layer, two inputs to each layer.

W_T is a layer of the dense network, W_S the same layer with fewer input channels, X^T and X^S its
inputs in the dense and in the pruned network. The loss of a layer is

    mu ||W_S X^T - W_T X^T||^2  (correction)  +  (1 - mu) ||W_S X^S - W_T X^S||^2  (imitation)

and input channels are removed by a proximal gradient: after every step the norms of all channels'
weights are reduced until as many are zero as the schedule asks for, from none to all but one.

Where we differ from the paper (equations and schedule are after descriptions of the authors' code,
haolibai/Cross-Distillation):
  * The loss is quadratic in W_S. With G = mu X^T X^T' + (1 - mu) X^S X^S', the channels K kept and
    R removed, its minimum is W_T,K + W_T,R G_RK G_KK^-1. We take it (with a ridge) instead of
    training by Adam; the proximal gradient also sees images only through G, in plain steps.
  * Norms shrink, as in the proximal operator of a sum of norms. The authors' code sets the smallest
    channels to zero, in the first third of its iterations, and trains the others on.
  * Channels are ranked on the dense network, where X^S = X^T, by the step at which the schedule
    removes them; the target then decides how many are removed. So one ranking serves all strengths.
  * Up to `samples_per_image` positions of a layer's output are used, evenly spaced.
  * In a transformer the channels are hidden units of MLPs, and fc2 is the layer; biases stay.
  * All layers lose the same fraction; the authors leave ResNet-34's last stage whole.
  * Fine-tuning is by AdamW; the authors use SGD with the same learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, TargetError
from vitrim.budget.trim import Scope, trim
from vitrim.closed_form.importance import consumer_of, importance
from vitrim.closed_form.reconstruction import taken_over
from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.method import Granularity
from vitrim.network import structure
from vitrim.network.computing import on_device
from vitrim.network.structure import Kind, Structure, cuttable_channels
from vitrim.network.survivors import index_of, removed_of, resolve
from vitrim.plan import Evidence, Keep, Plan, Proposal
from vitrim.trainer.classify import Classify
from vitrim.trainer.collect import Collect
from vitrim.trainer.phase import Phase
from vitrim.trainer.recipe import Recipe

SITES: Mapping[str, Kind] = {"mlp": "hidden", "channels": "channels"}
_CHUNK = 8  # images whose patches are in memory at the same time


@dataclass(frozen=True, kw_only=True, slots=True)
class CD:
    """Cross distillation with channel sparsity; every number comes from conf/method/cd.yaml."""

    levels: Sequence[float]
    sites: Sequence[str]
    scope: Scope
    round_to: int
    images: int
    samples_per_image: int
    mu: float
    steps: int
    power_iterations: int
    step_margin: float
    ridge: float
    fine_tuning: Recipe
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
            ("mu", is_rate(self.mu) and self.mu <= 1, "a number from 0 to 1"),
            ("steps", is_count(self.steps), count),
            ("power_iterations", is_count(self.power_iterations), count),
            (
                "step_margin",
                is_rate(self.step_margin) and self.step_margin >= 1,
                "a number from 1 on",
            ),
            ("ridge", is_positive(self.ridge), "a number above 0"),
        )

    def check(self, cost: Cost, target: Target) -> None:
        """Raise TargetError if the network has none of the units, or too few for the target."""
        names = cuttable_channels(cost.structure, [SITES[name] for name in self.sites])
        if not names:
            raise TargetError(f"method.sites={[*self.sites]}: this network has none of them")
        sites = cost.structure.sites
        self._trim(cost, {name: torch.ones(sites[name].size) for name in names}, target)

    @property
    def labelled_training(self) -> tuple[Recipe, ...]:
        """The fine-tuning."""
        return (self.fine_tuning,) if self.fine_tuning.epochs else ()

    def scorer(self, net: nn.Module) -> Collect:
        """Return the phase that keeps the images."""
        return Collect(net, images=self.images)

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Remove the channels that the proximal gradient removes first; by L1 without images."""
        described = cost.structure
        names = cuttable_channels(described, [SITES[name] for name in self.sites])
        if evidence.images is not None:
            scores = self._survival(net, described, names, evidence.images)
        else:
            scores = {
                name: importance(
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
        return Proposal(edits=self._trim(cost, scores, target))

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return the weights that minimise the loss, layer by layer."""
        if evidence.images is None:
            return {}
        return cross_distilled(
            net,
            plan,
            evidence.images,
            samples_per_image=self.samples_per_image,
            mu=self.mu,
            ridge=self.ridge,
        )

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> list[Phase]:
        """Return the fine-tuning."""
        if not self.fine_tuning.epochs:
            return []
        return [Classify(student, recipe=self.fine_tuning, n_classes=n_classes)]

    def _survival(
        self, net: nn.Module, described: Structure, names: Sequence[str], images: Tensor
    ) -> dict[str, Tensor]:
        """Return the survival of every channel, by site."""
        layers = {name: consumer_of(described, name).name for name in names}
        gram_of = grams(net, [*layers.values()], images, self.samples_per_image)
        return {
            name: survival_steps(
                net.get_parameter(f"{layer}.weight"),
                gram_of[layer],
                steps=self.steps,
                power_iterations=self.power_iterations,
                step_margin=self.step_margin,
            )
            for name, layer in layers.items()
        }

    def _trim(self, cost: Cost, scores: Mapping[str, Tensor], target: Target) -> tuple[Keep, ...]:
        return trim(cost, scores, target, scope=self.scope, round_to=self.round_to)


@torch.no_grad()
def cross_distilled(
    net: nn.Module,
    plan: Plan,
    images: Tensor,
    *,
    samples_per_image: int,
    mu: float,
    ridge: float,
) -> dict[str, Tensor]:
    """Return the weights of `cut(net, plan)`, by name, of layers that lose input channels.

    Args:
        net: the dense network, which is not changed.
        plan: what is cut.
        images: (n, C, H, W).
        samples_per_image: positions of a layer's output; all if there are fewer.
        mu: weight of correction against imitation, 0 to 1.
        ridge: that keeps the weights near the dense ones, relative to the mean square of inputs.
    """
    described = structure(net)
    survivors = resolve(described, plan)
    layers = {
        layer.name: (layer, keep.site)
        for keep in plan.keeps()
        for layer in (consumer_of(described, keep.site),)
    }
    dense_grams = grams(net, [*layers], images, samples_per_image)
    pruned = copy.deepcopy(net).eval()  # with the dense shapes: X^S has all channels
    values: dict[str, Tensor] = {}

    def solve(name: str) -> Callable[..., None]:
        layer, site = layers[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            own_gram = _gram(module, args[0], samples_per_image)
            gram = mu * dense_grams.pop(name) + (1 - mu) * own_gram
            weight, kept = module.get_parameter("weight"), survivors[site]
            solution = _minimum(weight, gram, kept, ridge)
            values[f"{name}.weight"] = solution[index_of(layer.out, survivors)]
            weight.zero_()
            weight[:, kept] = solution

        return hook

    for name in layers:
        pruned.get_submodule(name).register_forward_pre_hook(solve(name))
    pruned(images.to(next(pruned.parameters())))
    return values


@torch.no_grad()
def grams(
    net: nn.Module, layers: Sequence[str], images: Tensor, samples_per_image: int
) -> dict[str, Tensor]:
    """Return X X' of each layer's input, float64, (columns, columns), one column per weight."""
    twin = copy.deepcopy(net).eval()
    gram_of: dict[str, Tensor] = {}

    def gather(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            gram_of[name] = _gram(module, args[0], samples_per_image)

        return hook

    for name in layers:
        twin.get_submodule(name).register_forward_pre_hook(gather(name))
    twin(images.to(next(twin.parameters())))
    return gram_of


@torch.no_grad()
@on_device
def survival_steps(
    weight: Tensor, gram: Tensor, *, steps: int, power_iterations: int, step_margin: float
) -> Tensor:
    """Return how long each input channel survives the proximal gradient, higher is kept.

    Args:
        weight: W_T, (out, channels) or (out, channels, height, width).
        gram: of the layer's inputs, (columns, columns).
        steps: in which the number of channels falls from all to one.
        power_iterations: see `_max_eigenvalue`.
        step_margin: see `_max_eigenvalue`.
    """
    dense = weight.flatten(1).double()
    channels = weight.shape[1]
    rate = 1 / _max_eigenvalue(gram, power_iterations, step_margin)
    current = dense.clone()
    survival = torch.zeros(channels, dtype=torch.float64, device=dense.device)
    for step in range(1, steps + 1):
        current -= rate * (current - dense) @ gram
        grouped = current.view(len(current), channels, -1)
        norms = grouped.square().sum((0, 2)).sqrt()
        order = norms.argsort(descending=True, stable=True)
        n_kept = channels - (channels - 1) * step // steps
        threshold = norms[order[n_kept : n_kept + 1]] if n_kept < channels else norms.new_zeros(1)
        shrunk = (1 - threshold / norms.clamp_min(1e-300)).clamp_min(0.0)
        shrunk[order[n_kept:]] = 0.0
        current = (grouped * shrunk[:, None]).flatten(1)
        relative = norms / norms.max().clamp_min(1e-300)  # of one step, the larger ranks higher
        survival = torch.where(shrunk > 0, step + relative / 2, survival)
    return survival


def _max_eigenvalue(gram: Tensor, iterations: int, margin: float) -> float:
    """Return a bound on the largest eigenvalue: `margin` times what power iteration gives."""
    vector = torch.ones(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(iterations):
        vector = F.normalize(gram @ vector, dim=0)
    return max(margin * float((vector[None] @ gram)[0] @ vector), 1e-300)


def _minimum(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Return the best weights (out, kept, ...) in place of a layer's (out, channels, ...)."""
    flat = weight.flatten(1).double()
    area = flat.shape[1] // weight.shape[1]
    columns = (area * kept[:, None] + torch.arange(area)).flatten()
    removed = removed_of(flat.shape[1], columns)
    inputs, cross = (gram[columns][:, chosen] for chosen in (columns, removed))
    solution = flat[:, columns] + taken_over(inputs, cross, flat[:, removed], ridge)
    return solution.view(len(weight), len(kept), *weight.shape[2:]).to(weight)


def _gram(module: nn.Module, x: Tensor, samples_per_image: int) -> Tensor:
    """Return X X' of the patches that enter `module` at evenly spaced positions, float64."""
    total: Tensor | None = None
    for chunk in torch.split(x, _CHUNK):
        rows = _patches(module, chunk)
        n_positions = rows.shape[1]
        n_samples = min(samples_per_image, n_positions)
        sampled = torch.arange(n_samples) * n_positions // n_samples
        flat = rows[:, sampled].flatten(0, 1)
        part = (flat.T @ flat).double()
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of each output position, (images, positions, columns)."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(1, -2)
    assert isinstance(module.padding, tuple)
    columns = F.unfold(
        x,
        module.kernel_size,
        dilation=module.dilation,
        padding=module.padding,
        stride=module.stride,
    )
    return columns.transpose(1, 2)
