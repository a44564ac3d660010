"""From a scorer's evidence to losses and to the weights of the compact network."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.closed_form.importance import consumer_of
from vitrim.method.joint.allocation import Losses
from vitrim.network.decompose import decompose, lost_output
from vitrim.network.structure import Structure
from vitrim.network.survivors import removed_of
from vitrim.plan import Evidence, Plan
from vitrim.sensitivity import edits
from vitrim.sensitivity.parts import Parts, factorisable, sites_of
from vitrim.sensitivity.predict import weight_of
from vitrim.sensitivity.results import branch_names
from vitrim.sensitivity.rotate import rotate_


def losses_of(parts: Parts, evidence: Evidence) -> Losses:
    """Return the losses that a scorer found."""
    whole = evidence.moments.get("network", {})
    branches, int8 = whole.get("branches", torch.empty(0)), whole.get("int8", torch.empty(0))
    return Losses(
        units={site.name: evidence.scores[site.name] for site in parts.sites},
        components={layer.name: evidence.scores[layer.name] for layer in parts.layers},
        branches={
            name: loss
            for name, loss in zip(branch_names(parts), branches.tolist(), strict=True)
            if loss < float("inf")
        },
        int8=dict(zip(parts.int8, int8.tolist(), strict=True)),
    )


def equal_losses(cost: Cost, kinds: Collection[str]) -> Losses:
    """Return losses where no image was seen: units of a kind are alike, the first goes last.

    As in scoring, units that a convolution reads stay, and so do ranks of convolutions.
    """
    described = cost.structure
    drops = "branches" in kinds
    return Losses(
        units={
            site.name: torch.linspace(2, 1, site.size, dtype=torch.float64)
            for site in sites_of(described, kinds)
            if site.kind == "qk" or consumer_of(described, site.name).name in cost.linears
        },
        components={
            layer.name: torch.linspace(
                2,
                1,
                min(sum(part.size for part in dim) for dim in (layer.out, layer.inp)),
                dtype=torch.float64,
            )
            for layer in factorisable(described, kinds)
            if layer.name in cost.linears
        },
        branches={branch.name: 1e6 for branch in described.branches} if drops else {},
        int8={name: 1e-3 for name in cost.linears} if "int8" in kinds else {},
    )


@torch.no_grad()
def compensated(
    net: nn.Module, described: Structure, plan: Plan, evidence: Evidence, fold: float
) -> nn.Module:
    """Return a copy of `net` in the directions of its heads, in which what goes is made up for.

    The biases of output projections take over the mean of removed values, and kept hidden units
    what can be predicted of removed ones.
    """
    twin, moments = copy.deepcopy(net), evidence.moments
    bases = {
        name: (of_site["rows"], of_site["columns"])
        for name, of_site in moments.items()
        if "rows" in of_site
    }
    rotate_(twin, described, bases)
    for keep in plan.keeps():
        site = described.sites[keep.site]
        removed = removed_of(site.size, torch.tensor(keep.index)).nonzero()[:, 0]
        if site.kind == "hidden":
            layer = consumer_of(described, site.name).name
            values = edits.without_units(twin, layer, removed, moments[layer], fold)
            for name, value in values.items():
                twin.get_parameter(name).copy_(value)
        elif site.kind == "v" and site.name in bases:
            layer = consumer_of(described, site.name).name
            _take_over_mean(
                twin, layer, removed, moments[layer]["mean"], bases[site.name][0], site.head_dims
            )
    return twin


def _take_over_mean(
    twin: nn.Module,
    layer: str,
    removed: Tensor,
    mean: Tensor,
    rows: Tensor,
    head_dims: tuple[int, ...],
) -> None:
    """Add the mean of removed directions to the bias of the rotated output projection."""
    module = twin.get_submodule(layer)
    if module.bias is None:
        return
    parts = torch.split(mean.double(), list(head_dims))
    rotated = torch.cat(
        [r[: len(m), : len(m)].double() @ m for r, m in zip(rows, parts, strict=True)]
    )
    bias, weight = module.get_parameter("bias"), module.get_parameter("weight")
    bias.add_((weight.double()[:, removed] @ rotated[removed]).to(bias))


def factors(net: nn.Module, plan: Plan, evidence: Evidence, ridge: float) -> Mapping[str, Tensor]:
    """Return the values of low-rank layers: their factors under the metric, and their biases."""
    values: dict[str, Tensor] = {}
    for edit in plan.low_ranks():
        name, of_layer = edit.linear, evidence.moments[edit.linear]
        weight = weight_of(net, name)
        spectrum = decompose(
            weight, of_layer["metric"].double(), ridge=ridge, outputs=of_layer["outputs"].double()
        )
        up, down = spectrum.factors(edit.rank)
        values[f"{name}.up.weight"], values[f"{name}.down.weight"] = up, down
        bias = net.get_submodule(name).bias
        if isinstance(bias, Tensor):
            lost = lost_output(weight, up, down, of_layer["mean"])
            values[f"{name}.up.bias"] = bias.detach().double() + lost
    return values
