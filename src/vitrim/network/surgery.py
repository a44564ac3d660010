"""The two readings of a plan: `cut` makes the smaller network, `masked` its twin of the old shapes.

Both are pure: the network that comes in is not touched, and nothing in the result shares its
memory. Slices come first; what is factorised is what they leave of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitrim.network.attention import GatheredLinear, sliced
from vitrim.network.decompose import decompose
from vitrim.network.dispatch import drop, structure
from vitrim.network.factored import LowRankLinear, SplitLinear
from vitrim.network.structure import Attention, Layer, Structure, names_in, runs_of
from vitrim.network.survivors import (
    Survivors,
    as_keeps,
    axes_of,
    dropped_of,
    index_of,
    ranks_of,
    removed_of,
    resolve,
    width_of,
    widths_of,
)
from vitrim.plan import Plan

M = TypeVar("M", bound=nn.Module)


def cut(net: nn.Module, plan: Plan) -> nn.Module:
    """Return a new, physically smaller network that computes what `masked(net, plan)` computes.

    Works on any device, the meta device included. A plan without edits gives a bit-identical copy.
    Low-rank layers get the factors of the truncated SVD.

    Raises:
        UnsupportedArchitecture: the network's class has no family module.
        PlanError: the plan does not fit the network.
    """
    return _cut(net, plan, lambda sliced: copy.deepcopy(net, dict(sliced)))


def carve(net: nn.Module, plan: Plan) -> nn.Module:
    """Cut `net` itself and return it: for a skeleton that nobody else holds, whose copy is waste.

    Raises:
        UnsupportedArchitecture: the network's class has no family module.
        PlanError: the plan does not fit the network.
    """
    return _cut(net, plan, lambda sliced: _replace(net, sliced))


def _cut(net: nn.Module, plan: Plan, put: Callable[[dict[int, object]], nn.Module]) -> nn.Module:
    """Cut what `put` makes of the sliced parameters, which it gets by the ids of the whole ones."""
    described = structure(net)
    dropped = dropped_of(described, plan)
    survivors = resolve(described, plan)
    ranks = ranks_of(described, plan)
    slices = {
        layer.name: axes_of(layer, survivors)
        for layer in described.layers
        if _is_cut(layer, described, survivors)
    }
    compact = put(_slices(net, slices, _entries(net, described, survivors)))
    for name in dropped:
        drop(compact, name)
    for layer in described.layers:
        if layer.name in slices:
            _narrow(compact, layer, slices[layer.name])
    for attention in described.attentions:
        if attention.branch not in dropped:
            _reshape(compact, attention, described, survivors)
    for layer in described.layers if ranks else ():
        _factorise(compact, layer, survivors, ranks)
    return compact


def masked(net: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of `net`, same shapes, with zeros wherever `plan` removes something.

    Weights that it factorises are the product of their factors; a dropped branch ends in zeros.
    """
    described = structure(net)
    dropped = dropped_of(described, plan)
    survivors = resolve(described, plan)
    ranks = ranks_of(described, plan)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for branch in described.branches:
            for path in branch.ends if branch.name in dropped else ():
                for tensor in twin.get_submodule(path).parameters():
                    tensor.zero_()
        for table in described.tables:
            entries = twin.get_parameter(table.name).movedim(table.axis, 0)
            entries[removed_of(len(entries), survivors[table.site])] = 0.0
        for layer in described.layers:
            weight, bias = _tensors(twin, layer.name)
            axes = axes_of(layer, survivors)
            for axis, kept in enumerate(axes):
                weight.movedim(axis, 0)[removed_of(weight.shape[axis], kept)] = 0.0
            if bias is not None:
                bias[removed_of(len(bias), axes[0])] = 0.0
            for name, out in runs_of(layer).items():
                if name in ranks:
                    rows, columns = index_of(out, survivors)[:, None], axes[1]
                    up, down = decompose(weight[rows, columns], None).factors(ranks[name])
                    weight[rows, columns] = up @ down
    return twin


def compose(net: nn.Module, first: Plan, second: Plan) -> Plan:
    """Return one plan on `net` with the structure of `second` applied to `cut(net, first)`.

    Its cut computes the same, too, unless `first` factorises what `second` slices: the slices then
    come before the factors.
    """
    outer = structure(net)
    kept = resolve(outer, first)
    inner = structure(cut(_on_meta(net), first))
    dropped_of(inner, second)
    survivors = kept | {site: kept[site][index] for site, index in resolve(inner, second).items()}
    asked = {keep.site: torch.tensor(keep.index) for keep in first.keeps()}
    for keep in second.keeps():
        asked[keep.site] = kept[keep.site][torch.tensor(keep.index)]
    steps = [
        step for plan in (first, second) for step in plan.provenance.get("steps", [plan.provenance])
    ]
    ranks_of(inner, second)
    drops = (*first.drops(), *second.drops())
    gone = names_in(outer, {edit.branch for edit in drops})
    keeps = (keep for keep in as_keeps(outer, survivors, asked) if keep.site not in gone)
    ranks = (edit for plan in (first, second) for edit in plan.low_ranks())
    return Plan(
        model=first.model,
        edits=(*drops, *keeps, *(edit for edit in ranks if edit.linear not in gone)),
        provenance={"steps": [dict(step) for step in steps]},
    )


def _tensors(net: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return weight and bias of the layer at `name`."""
    layer = net.get_submodule(name)
    bias = layer.bias
    return layer.get_parameter("weight"), None if bias is None else layer.get_parameter("bias")


def _on_meta(net: nn.Module) -> nn.Module:
    memo: dict[int, object] = {
        id(tensor): nn.Parameter(tensor.to("meta"), requires_grad=tensor.requires_grad)
        for tensor in net.parameters()
    }
    return copy.deepcopy(net, memo)


def _is_cut(layer: Layer, described: Structure, survivors: Survivors) -> bool:
    return any(
        part.site is not None and len(survivors[part.site]) < described.sites[part.site].size
        for part in (*layer.out, *layer.inp)
    )


def _slices(
    net: nn.Module,
    sliced: Mapping[str, tuple[Tensor, ...]],
    tables: Mapping[str, tuple[Tensor, ...]],
) -> dict[int, object]:
    """Return, by the id of each parameter of `net`, the one in its place: a slice or a copy.

    `sliced` holds the kept rows and columns of layers, `tables` the kept entries of tables.
    Statistics of sliced BatchNorms are buffers, and among them, too.
    """
    index: dict[int, tuple[Tensor, ...]] = {}
    held: dict[int, object] = {}
    for name, axes in sliced.items():
        weight, bias = _tensors(net, name)
        index[id(weight)] = axes
        index[id(bias)] = axes[:1]
        for tensor in _statistics(net.get_submodule(name)):
            held[id(tensor)] = _slice(tensor, axes[:1])
    for name, axes in tables.items():
        index[id(net.get_parameter(name))] = axes
    return held | {
        id(tensor): nn.Parameter(
            _slice(tensor.detach(), index.get(id(tensor), ())), requires_grad=tensor.requires_grad
        )
        for tensor in net.parameters()
    }


def _entries(
    net: nn.Module, described: Structure, survivors: Survivors
) -> dict[str, tuple[Tensor, ...]]:
    """Return the kept entries of every table, along each axis up to the one that is cut."""
    return {
        table.name: (
            *(torch.arange(size) for size in net.get_parameter(table.name).shape[: table.axis]),
            survivors[table.site],
        )
        for table in described.tables
    }


def _statistics(module: nn.Module) -> Iterator[Tensor]:
    """Iterate over the buffers that have one number per row."""
    for name, tensor in module.named_buffers(recurse=False):
        if name in ("running_mean", "running_var"):
            yield tensor


def _replace(net: nn.Module, sliced: Mapping[int, object]) -> nn.Module:
    for module in net.modules():
        for name, tensor in [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]:
            if id(tensor) in sliced:
                setattr(module, name, sliced[id(tensor)])
    return net


def _slice(tensor: Tensor, index: Sequence[Tensor]) -> Tensor:
    """Return a contiguous copy of the kept rows (axis 0) and, if given, columns (axis 1)."""
    whole = tensor
    for axis, kept in enumerate(index):
        if len(kept) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor.clone() if tensor is whole else tensor


def _narrow(compact: nn.Module, layer: Layer, index: tuple[Tensor, ...]) -> None:
    """Make the module at `layer` agree with its sliced tensors."""
    linear = compact.get_submodule(layer.name)
    weight, bias = _tensors(compact, layer.name)
    match linear:
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            linear.num_features = len(weight)
            return
        case nn.Conv2d():
            linear.out_channels = len(weight)
            linear.in_channels = weight.shape[1] if layer.inp else len(weight)
            linear.groups = 1 if layer.inp else len(weight)
            return
    columns = index[1]
    if not layer.gathers or len(columns) == linear.in_features:
        rows, width = weight.shape
        linear.out_features, linear.in_features = rows, width  # type: ignore[assignment]
        return
    if isinstance(linear, GatheredLinear):
        columns = linear.index.cpu()[columns]
    at = columns if weight.is_meta else columns.to(weight.device)
    gathered = GatheredLinear(weight=weight, bias=bias, index=at)
    gathered.training = linear.training
    compact.set_submodule(layer.name, gathered)


def _factorise(
    compact: nn.Module, layer: Layer, survivors: Survivors, ranks: Mapping[str, int]
) -> None:
    """Put two factors in the place of a sliced layer, or of those of its pieces that have ranks."""
    runs = runs_of(layer)
    if ranks.keys().isdisjoint(runs):
        return
    linear = compact.get_submodule(layer.name)
    if layer.name in ranks:
        compact.set_submodule(layer.name, _factors(linear, ranks[layer.name]))
    else:
        del runs[layer.name]
        start, parts = 0, {}
        for name, out in runs.items():
            rows = width_of(out, survivors)
            part: nn.Module = _rows(linear, slice(start, start + rows))
            start += rows
            parts[name.rpartition(".")[2]] = _factors(part, ranks[name]) if name in ranks else part
        compact.set_submodule(layer.name, _in_mode_of(linear, SplitLinear(parts)))


def _factors(linear: nn.Module, rank: int) -> LowRankLinear:
    """Return the factors of the truncated SVD; beyond what the layer has, they are zero."""
    weight = linear.get_parameter("weight")
    rows, columns = weight.shape
    down, up = weight.new_zeros(rank, columns), weight.new_zeros(rows, rank)
    if not weight.is_meta:
        found = decompose(weight.detach(), None).factors(rank)
        up[:, : found[0].shape[1]], down[: found[1].shape[0]] = found
    bias = linear.bias.detach() if isinstance(linear.bias, Tensor) else None
    return _in_mode_of(linear, LowRankLinear(_like(linear, down, None), _linear(up, bias)))


def _rows(linear: nn.Module, rows: slice) -> nn.Module:
    """Return the layer of some of its rows."""
    bias = linear.bias.detach()[rows].clone() if isinstance(linear.bias, Tensor) else None
    return _like(linear, linear.get_parameter("weight").detach()[rows].clone(), bias)


def _like(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a layer that reads what `linear` reads."""
    if not isinstance(linear, GatheredLinear):
        return _linear(weight, bias)
    held = None if bias is None else nn.Parameter(bias)
    return GatheredLinear(weight=nn.Parameter(weight), bias=held, index=linear.index.clone())


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _in_mode_of(linear: nn.Module, made: M) -> M:
    """Return `made` in training mode, and trainable, if `linear` is."""
    made.requires_grad_(linear.get_parameter("weight").requires_grad)
    return made.train(linear.training)


def _reshape(
    compact: nn.Module, attention: Attention, described: Structure, survivors: Survivors
) -> None:
    """Give the attention module at `attention` the widths of its surviving heads."""
    qk_site, v_site = described.sites[attention.qk], described.sites[attention.v]
    if len(survivors[qk_site.name]) == qk_site.size and len(survivors[v_site.name]) == v_site.size:
        return
    heads = survivors[attention.heads]
    qk_dims, v_dims = (
        tuple(widths_of(site, survivors)[heads].tolist()) for site in (qk_site, v_site)
    )
    attn = compact.get_submodule(attention.branch)
    made = sliced(attn, qk_dims=qk_dims, v_dims=v_dims)
    made.training = attn.training
    compact.set_submodule(attention.branch, made)
