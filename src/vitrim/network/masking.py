"""The dense twin of a cut network, which computes the same in the shapes of the dense one."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrim.network.decompose import decompose
from vitrim.network.dispatch import structure
from vitrim.network.int8 import int8_of
from vitrim.network.int8_linear import fake_int8
from vitrim.network.structure import Layer, factorisable_rows
from vitrim.network.surgery import tensors_of
from vitrim.network.survivors import (
    Kept,
    axes_of,
    dropped_of,
    index_of,
    ranks_of,
    removed_of,
    resolve,
)
from vitrim.plan import Plan, PlanError


def masked(net: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of `net` with the same shapes and zeros for everything that `plan` removes.

    A factorised weight is the product of its factors; an int8 weight has its rounded values; a
    dropped branch ends in zeros.

    Raises:
        UnsupportedArchitecture: the network's class has no family module.
        PlanError: the plan does not fit the network, or inputs are to be int8 as well: these are
            rounded at run time.
    """
    described = structure(net)
    dropped = dropped_of(described, plan)
    survivors = resolve(described, plan)
    ranks = ranks_of(described, plan)
    int8 = int8_of(net, described, plan)
    if any(int8.values()):
        raise PlanError("int8 inputs cannot be masked: set dynamic=false")
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for branch in described.branches:
            for path in branch.ends if branch.name in dropped else ():
                for tensor in twin.get_submodule(path).parameters():
                    tensor.zero_()
        for item in described.per_head_parameters:
            entries = twin.get_parameter(item.name).movedim(item.axis, 0)
            entries[removed_of(len(entries), survivors[item.site])] = 0.0
        for layer in described.layers:
            weight, bias = tensors_of(twin, layer.name)
            axes = axes_of(layer, survivors)
            for axis, kept in enumerate(axes):
                weight.movedim(axis, 0)[removed_of(weight.shape[axis], kept)] = 0.0
            if bias is not None:
                bias[removed_of(len(bias), axes[0])] = 0.0
            _mask_precision(weight, layer, survivors, ranks, in_int8=layer.name in int8)
        sliced_layers = {layer.name for layer in described.layers}
        for name in int8.keys() - sliced_layers:
            weight, _ = tensors_of(twin, name)
            weight.copy_(fake_int8(weight))
    return twin


def _mask_precision(
    weight: Tensor, layer: Layer, survivors: Kept, ranks: Mapping[str, int], *, in_int8: bool
) -> None:
    """Give what is kept of a weight the values of its factors and of int8, in place."""
    if not in_int8 and ranks.keys().isdisjoint(factorisable_rows(layer)):
        return
    dense, columns = weight.clone(), index_of(layer.inp, survivors)
    for name, out in factorisable_rows(layer).items():
        rows = index_of(out, survivors)[:, None]
        factors: tuple[Tensor, ...] = (dense[rows, columns],)
        if name in ranks:
            factors = decompose(factors[0], None).factors(ranks[name])
        elif name != layer.name:
            continue
        values = [fake_int8(factor) if in_int8 else factor for factor in factors]
        weight[rows, columns] = values[0] if len(values) == 1 else values[0] @ values[1]
