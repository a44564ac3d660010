"""Apply a plan: `cut` returns the smaller network; `vitrim.network.masking` has its dense twin.

`cut` is pure: the given network is not modified and shares no memory with the result. Slices are
applied first; a low-rank edit factorises the sliced layer; int8 rounds what has resulted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitrim.network.attention import GatheredLinear, sliced
from vitrim.network.decompose import decompose
from vitrim.network.dispatch import drop_branch, structure
from vitrim.network.factored import LowRankLinear, SplitLinear
from vitrim.network.int8 import int8_of, quantize_
from vitrim.network.structure import Attention, Layer, Structure, factorisable_rows, members
from vitrim.network.survivors import (
    Kept,
    axes_of,
    dropped_of,
    ranks_of,
    resolve,
    to_edits,
    width_of,
    widths_of,
)
from vitrim.plan import MAX_NAME, Int8, LowRank, Plan

M = TypeVar("M", bound=nn.Module)


def cut(net: nn.Module, plan: Plan) -> nn.Module:
    """Return a new, physically smaller network that computes what `masked(net, plan)` computes.

    Works on any device, the meta device included. A plan without edits returns a bit-identical
    copy. Low-rank layers get the factors of the truncated SVD.

    Raises:
        UnsupportedArchitecture: the network's class has no family module.
        PlanError: the plan does not fit the network.
    """
    return _cut(net, plan, lambda parameters: copy.deepcopy(net, dict(parameters)))


def cut_(net: nn.Module, plan: Plan) -> nn.Module:
    """Cut `net` in place and return it; avoids the copy of a skeleton that has one owner.

    Raises:
        UnsupportedArchitecture: the network's class has no family module.
        PlanError: the plan does not fit the network.
    """
    return _cut(net, plan, lambda parameters: _replace(net, parameters))


def _cut(
    net: nn.Module, plan: Plan, with_parameters: Callable[[dict[int, object]], nn.Module]
) -> nn.Module:
    """Cut the network that `with_parameters` makes of sliced parameters, by the dense ones' ids."""
    described = structure(net)
    dropped = dropped_of(described, plan)
    survivors = resolve(described, plan)
    ranks = ranks_of(described, plan)
    int8 = int8_of(net, described, plan)
    slices = {
        layer.name: axes_of(layer, survivors)
        for layer in described.layers
        if _is_cut(layer, described, survivors)
    }
    compact = with_parameters(_slices(net, slices, _per_head_slices(net, described, survivors)))
    for name in dropped:
        drop_branch(compact, name)
    for layer in described.layers:
        if layer.name in slices:
            _narrow(compact, layer, slices[layer.name])
    for attention in described.attentions:
        if attention.branch not in dropped:
            _reshape(compact, attention, described, survivors)
    for layer in described.layers if ranks else ():
        _factorise(compact, layer, survivors, ranks)
    return quantize_(compact, int8)


def combine(net: nn.Module, first: Plan, second: Plan) -> Plan:
    """Return one plan on `net` that has the structure of `second` applied to `cut(net, first)`.

    Its cut also computes the same, unless `first` factorises a layer that `second` slices: the
    combined plan slices before it factorises. Its method is the methods of both plans, joined by
    "+"; its provenance lists both as `steps`.
    """
    outer = structure(net)
    kept = resolve(outer, first)
    inner = structure(cut(_on_meta(net), first))
    dropped_of(inner, second)
    survivors = kept | {site: kept[site][index] for site, index in resolve(inner, second).items()}
    requested = {keep.site: torch.tensor(keep.index) for keep in first.keeps()}
    for keep in second.keeps():
        requested[keep.site] = kept[keep.site][torch.tensor(keep.index)]
    ranks_of(inner, second)
    drops = (*first.drops(), *second.drops())
    removed = members(outer, {edit.branch for edit in drops})
    keeps = (keep for keep in to_edits(outer, survivors, requested) if keep.site not in removed)
    linears = [
        edit
        for plan in (first, second)
        for edit in plan.edits
        if isinstance(edit, LowRank | Int8) and edit.linear not in removed
    ]
    steps = [*steps_of(first), *steps_of(second)]
    return Plan(
        model=first.model,
        edits=(*drops, *keeps, *linears),
        method=method_of(steps),
        provenance={"steps": steps},
    )


def steps_of(plan: Plan) -> list[dict[str, object]]:
    """Return the notes of every method that made the plan, in order, `method` among them."""
    steps = plan.provenance.get("steps")
    if steps is not None:
        return [dict(step) for step in steps]
    return [{"method": plan.method, **plan.provenance} if plan.method else dict(plan.provenance)]


def method_of(steps: Iterable[Mapping[str, object]]) -> str:
    """Return the methods of steps, joined by "+" and shortened to the longest name of a plan.

    >>> method_of([{"method": "first", "strength": 2}, {"method": "second"}])
    'first+second'
    """
    joined = "+".join(str(step["method"]) for step in steps if step.get("method"))
    return joined if len(joined) <= MAX_NAME else f"{joined[: MAX_NAME - 3]}..."


def tensors_of(net: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter | None]:
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


def _is_cut(layer: Layer, described: Structure, survivors: Kept) -> bool:
    return any(
        part.site is not None and len(survivors[part.site]) < described.sites[part.site].size
        for part in (*layer.out, *layer.inp)
    )


def _slices(
    net: nn.Module,
    of_layers: Mapping[str, tuple[Tensor, ...]],
    of_parameters: Mapping[str, tuple[Tensor, ...]],
) -> dict[int, object]:
    """Return, by the id of each parameter of `net`, its replacement: a slice or a copy.

    The statistics of sliced BatchNorms, which are buffers, are included.

    Args:
        net: the network to slice.
        of_layers: the kept rows and columns of layers, by name.
        of_parameters: the kept entries along each axis of per-head parameters, by name.
    """
    index: dict[int, tuple[Tensor, ...]] = {}
    buffers: dict[int, object] = {}
    for name, axes in of_layers.items():
        weight, bias = tensors_of(net, name)
        index[id(weight)] = axes
        index[id(bias)] = axes[:1]
        for tensor in statistics_of(net.get_submodule(name)):
            buffers[id(tensor)] = _slice(tensor, axes[:1])
    for name, axes in of_parameters.items():
        index[id(net.get_parameter(name))] = axes
    return buffers | {
        id(tensor): nn.Parameter(
            _slice(tensor.detach(), index.get(id(tensor), ())), requires_grad=tensor.requires_grad
        )
        for tensor in net.parameters()
    }


def _per_head_slices(
    net: nn.Module, described: Structure, survivors: Kept
) -> dict[str, tuple[Tensor, ...]]:
    """Return the kept entries of every per-head parameter, along each axis up to the cut one."""
    return {
        item.name: (
            *(torch.arange(size) for size in net.get_parameter(item.name).shape[: item.axis]),
            survivors[item.site],
        )
        for item in described.per_head_parameters
    }


def statistics_of(module: nn.Module) -> Iterator[Tensor]:
    """Iterate over the buffers that have one element per row."""
    for name, tensor in module.named_buffers(recurse=False):
        if name in ("running_mean", "running_var"):
            yield tensor


def _replace(net: nn.Module, tensors: Mapping[int, object]) -> nn.Module:
    for module in net.modules():
        for name, tensor in [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]:
            if id(tensor) in tensors:
                setattr(module, name, tensors[id(tensor)])
    return net


def _slice(tensor: Tensor, index: Sequence[Tensor]) -> Tensor:
    """Return a contiguous copy of the kept rows (axis 0) and, if given, columns (axis 1)."""
    original = tensor
    for axis, kept in enumerate(index):
        if len(kept) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor.clone() if tensor is original else tensor


def _narrow(compact: nn.Module, layer: Layer, axes: tuple[Tensor, ...]) -> None:
    """Adapt the module at `layer` to its sliced tensors."""
    linear = compact.get_submodule(layer.name)
    weight, bias = tensors_of(compact, layer.name)
    match linear:
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            linear.num_features = len(weight)
            return
        case nn.Conv2d():
            linear.out_channels = len(weight)
            linear.in_channels = weight.shape[1] if layer.inp else len(weight)
            linear.groups = 1 if layer.inp else len(weight)
            return
    columns, wide = axes[1], int(linear.in_features)  # type: ignore[arg-type]
    if isinstance(linear, GatheredLinear):
        columns = linear.get_buffer("index").cpu()[columns]
    elif not layer.gathers or len(columns) == wide:
        rows, width = weight.shape
        linear.out_features, linear.in_features = rows, width  # type: ignore[assignment]
        return
    index = columns if weight.is_meta else columns.to(weight.device)
    gathered = GatheredLinear(weight=weight, bias=bias, index=index, in_features=wide)
    compact.set_submodule(layer.name, gathered.train(linear.training))


def _factorise(compact: nn.Module, layer: Layer, survivors: Kept, ranks: Mapping[str, int]) -> None:
    """Replace a sliced layer, or those of its pieces that have ranks, by two factors."""
    runs = factorisable_rows(layer)
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
        compact.set_submodule(layer.name, _match_mode(linear, SplitLinear(parts)))


def _factors(linear: nn.Module, rank: int) -> LowRankLinear:
    """Return the factors of the truncated SVD, padded with zeros above the rank of the layer."""
    weight = linear.get_parameter("weight")
    rows, columns = weight.shape
    down, up = weight.new_zeros(rank, columns), weight.new_zeros(rows, rank)
    if not weight.is_meta:
        svd_up, svd_down = decompose(weight.detach(), None).factors(rank)
        up[:, : svd_up.shape[1]], down[: svd_down.shape[0]] = svd_up, svd_down
    bias = linear.bias.detach() if isinstance(linear.bias, Tensor) else None
    return _match_mode(linear, LowRankLinear(_like_input(linear, down, None), _linear(up, bias)))


def _rows(linear: nn.Module, rows: slice) -> nn.Module:
    """Return a layer of some rows of `linear`."""
    bias = linear.bias.detach()[rows].clone() if isinstance(linear.bias, Tensor) else None
    return _like_input(linear, linear.get_parameter("weight").detach()[rows].clone(), bias)


def _like_input(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a layer with the given weight that reads the same input columns as `linear`."""
    if not isinstance(linear, GatheredLinear):
        return _linear(weight, bias)
    parameter = None if bias is None else nn.Parameter(bias)
    return GatheredLinear(
        weight=nn.Parameter(weight),
        bias=parameter,
        index=linear.get_buffer("index").clone(),
        in_features=linear.in_features,
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _match_mode(linear: nn.Module, replacement: M) -> M:
    """Return `replacement` in training mode, and trainable, if `linear` is."""
    replacement.requires_grad_(linear.get_parameter("weight").requires_grad)
    return replacement.train(linear.training)


def _reshape(
    compact: nn.Module, attention: Attention, described: Structure, survivors: Kept
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
    replacement = sliced(attn, qk_dims=qk_dims, v_dims=v_dims)
    replacement.training = attn.training
    compact.set_submodule(attention.branch, replacement)
