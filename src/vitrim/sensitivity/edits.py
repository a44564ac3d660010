"""Edits of the dense network in its own shapes: what measuring a loss tries out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitrim.closed_form.reconstruction import taken_over
from vitrim.sensitivity.losses import Rotation


def without_units(
    net: nn.Module, layer: str, removed: Tensor, moments: Mapping[str, Tensor], ridge: float
) -> dict[str, Tensor]:
    """Return the weight and bias of `layer` after the inputs `removed` were folded into others."""
    weight = net.get_submodule(layer).get_parameter("weight").detach().double()
    cov, mean = moments["cov"].double(), moments["mean"]
    kept = torch.ones(weight.shape[1], dtype=torch.bool)
    kept[removed] = False
    kept_units = kept.nonzero()[:, 0]
    cross = cov[kept_units][:, removed]
    folded = taken_over(cov[kept_units][:, kept_units], cross, weight[:, removed], ridge)
    values = torch.zeros_like(weight)
    values[:, kept_units] = weight[:, kept_units] + folded
    return _with_bias(net, layer, values, weight, mean)


def without_values(
    net: nn.Module,
    layer: str,
    rotations: Sequence[Rotation],
    widths: Sequence[int],
    mean: Tensor,
) -> dict[str, Tensor]:
    """Return the output projection that reads the first directions of every head only."""
    weight = net.get_submodule(layer).get_parameter("weight").detach().double()
    values, start = torch.zeros_like(weight), 0
    for rotation, width in zip(rotations, widths, strict=True):
        columns = slice(start, start + len(rotation.losses))
        kept = rotation.columns[:, :width] @ rotation.rows[:width]
        values[:, columns] = weight[:, columns] @ kept
        start = columns.stop
    return _with_bias(net, layer, values, weight, mean)


def without_query_keys(
    net: nn.Module, layer: str, rotations: Sequence[Rotation], widths: Sequence[int]
) -> dict[str, Tensor]:
    """Return the layer `qkv` whose keys have the first directions of every head only."""
    values: dict[str, Tensor] = {}
    for name, parameter in net.get_submodule(layer).named_parameters():
        changed = parameter.detach().double().clone()
        start = sum(len(rotation.losses) for rotation in rotations)  # the keys follow the queries
        for rotation, width in zip(rotations, widths, strict=True):
            rows = slice(start, start + len(rotation.losses))
            kept = rotation.rows[:width].mT @ rotation.columns[:width]
            changed[rows] = kept @ changed[rows]
            start = rows.stop
        values[f"{layer}.{name}"] = changed
    return values


def without_keys(net: nn.Module, layer: str, n_queries: int, removed: Tensor) -> dict[str, Tensor]:
    """Return the layer `qkv` in which the keys, which follow the queries, lack some dims."""
    values: dict[str, Tensor] = {}
    for name, parameter in net.get_submodule(layer).named_parameters():
        changed = parameter.detach().clone()
        changed[n_queries + removed] = 0.0
        values[f"{layer}.{name}"] = changed
    return values


def with_weight(net: nn.Module, layer: str, weight: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Return another weight of `layer` and the bias that keeps its mean output."""
    dense = net.get_submodule(layer).get_parameter("weight").detach().double()
    return _with_bias(net, layer, weight.double(), dense, mean)


def without_branch(net: nn.Module, ends: Sequence[str]) -> dict[str, Tensor]:
    """Return zeros for all parameters at the ends of a branch."""
    return {
        f"{path}.{name}": torch.zeros_like(parameter)
        for path in ends
        for name, parameter in net.get_submodule(path).named_parameters()
    }


def _with_bias(
    net: nn.Module, layer: str, weight: Tensor, dense: Tensor, mean: Tensor
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {f"{layer}.weight": weight}
    bias: Mapping[str, Tensor] = dict(net.get_submodule(layer).named_parameters())
    if "bias" in bias:
        values[f"{layer}.bias"] = bias["bias"].detach().double() + (dense - weight) @ mean.double()
    return values
