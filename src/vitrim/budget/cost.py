"""The closed formula of a network: params, MACs and bytes from the widths that a plan leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from torch import nn

from vitrim.budget.target import CountedMetric, Target, TargetError
from vitrim.measure import InputSize, count_layers
from vitrim.network import structure
from vitrim.network.factored import widths_of_layer
from vitrim.network.int8 import is_int8, linears_of
from vitrim.network.structure import (
    Dim,
    Layer,
    Part,
    Structure,
    block_order,
    blocks_of,
    factorisable_rows,
    members,
)
from vitrim.network.surgery import statistics_of
from vitrim.network.survivors import Kept, dropped_of, propagate, ranks_of, resolve, width_of
from vitrim.plan import Plan, PlanError


class Amount(NamedTuple):
    """What a plan leaves, as exact integers; counting the cut network gives the same.

    `size_bytes` are those of the tensors that `vitrim.save` writes: parameters and buffers.
    """

    params: int
    macs: int
    units: int
    size_bytes: int

    def of(self, metric: CountedMetric) -> int:
        """Return the amount of one metric.

        >>> Amount(params=3, macs=2, units=1, size_bytes=12).of("macs")
        2
        """
        match metric:
            case "params":
                return self.params
            case "macs":
                return self.macs
            case "units":
                return self.units
            case "size_bytes":
                return self.size_bytes


_SCALE = 4
"""Bytes of the scale of a row."""


class _Linear(NamedTuple):
    """The widths of a Linear, and the bytes of one of its weights."""

    columns: int
    rows: int
    itemsize: int

    @property
    def saved(self) -> int:
        """The bytes that int8 saves."""
        return self.rows * (self.columns * (self.itemsize - 1) - _SCALE)


class TimeModel(Protocol):
    """Predicts the latency of a cut network on this device (see `vitrim.budget.latency`)."""

    @property
    def dense_ms(self) -> float:
        """Latency of the dense network in milliseconds."""
        ...

    def ratio(self, described: Structure, survivors: Kept) -> float:
        """Return the latency of a cut network over that of the dense one."""
        ...

    def check(self, described: Structure, scored: Sequence[str]) -> None:
        """Raise a VitrimError if the time that cutting `scored` saves cannot be predicted."""
        ...


class _Term(NamedTuple):
    """Params, MACs and bytes of a layer for each of its weights, or for each of its rows.

    With `layer`, there are rows x columns weights (fewer in two factors); without, one per row.
    `linear` is the layer's name in a plan that makes it int8, and empty where it stays in float.
    """

    branch: str
    params: int
    macs: int
    nbytes: int
    out: Dim
    layer: Layer | None = None
    linear: str = ""


class _Constant(NamedTuple):
    """Params and bytes that no plan narrows."""

    params: int
    nbytes: int


class Cost:
    """The closed formula of one network: params, MACs and bytes from the widths that a plan leaves.

    Each Linear has rows x columns weights, or rank x (rows + columns) in two factors, and is
    applied at its positions. A Conv has a kernel in place of each weight, or of each row if it is
    depthwise; norms have no MACs. Each attention costs its context times its query-key and value
    dims at every token. Everything that no plan cuts is a constant. An int8 weight is one byte, and
    each of its rows (of both factors) has a scale of four.

    Args:
        net: the network that plans are for.
        input_size: of its images.
        origin: the cost of the dense network, if `net` was cut from one: targets count from it.
        latency_table: returns what predicts latency on this device, and measures it when first
            called.

    Raises:
        PlanError: the network has int8 layers.
    """

    def __init__(
        self,
        net: nn.Module,
        input_size: InputSize,
        origin: Cost | None = None,
        latency_table: Callable[[], TimeModel] | None = None,
    ) -> None:
        if is_int8(net):
            raise PlanError("the network has int8 layers: plan for the float network")
        self.latency_table = latency_table
        self.structure: Structure = structure(net)
        self.input_size = input_size
        self._origin = origin or self
        called = {layer.name: layer.positions_from or layer.name for layer in self.structure.layers}
        called |= {attention.qkv: attention.qkv for attention in self.structure.attentions}
        self.dense_count, positions = count_layers(
            net, input_size, [*dict.fromkeys(called.values())]
        )
        self._positions = {name: positions[module] for name, module in called.items()}
        self._linears = {
            name: _Linear(*widths_of_layer(layer), next(layer.parameters()).itemsize)
            for name, layer in linears_of(net).items()
        }
        self._terms = list(_terms(net, self.structure, self._positions, self._linears))
        self._terms_of = {
            name: [term for term in self._terms if term.branch == name]
            for name in {term.branch for term in self._terms}
        }
        self._unsliced = self._linears.keys() - {term.linear for term in self._terms}
        dense = propagate(self.structure, {})
        weights = [_weights(term, dense, {}) for term in self._terms]
        params = sum(term.params * n for term, n in zip(self._terms, weights, strict=True))
        macs = sum(term.macs * n for term, n in zip(self._terms, weights, strict=True))
        nbytes = sum(term.nbytes * n for term, n in zip(self._terms, weights, strict=True))
        size = sum(tensor.nbytes for tensor in net.state_dict().values())
        self._constant = _Constant(self.dense_count.params - params, size - nbytes)
        self._constant_macs = self.dense_count.macs - macs
        self._constant_of_branch = _constants(net, self.structure, self._terms, weights)

    def cost_of(
        self,
        survivors: Kept,
        scored: Sequence[str] = (),
        ranks: Mapping[str, int] | None = None,
        dropped: Collection[str] = (),
        int8: Collection[str] = (),
        within: str | None = None,
    ) -> Amount:
        """Return what remains.

        Args:
            survivors: the units kept at every site.
            scored: the sites whose kept units are counted as `units`.
            ranks: the rank of each layer, or piece of a layer, that is in two factors.
            dropped: the branches that are removed, with their norms and layer scales.
            int8: the layers whose weights are int8.
            within: a branch: only its layers are counted then, besides all constants, so that two
                amounts differ by what they do in networks that are alike elsewhere.
        """
        constants = [self._constant_of_branch[name] for name in dropped]
        params = self._constant.params - sum(constant.params for constant in constants)
        size = self._constant.nbytes - sum(constant.nbytes for constant in constants)
        macs = self._constant_macs
        for term in self._terms if within is None else self._terms_of.get(within, ()):
            if term.branch not in dropped:
                weights = _weights(term, survivors, ranks or {})
                params += term.params * weights
                macs += term.macs * weights
                if term.linear and term.linear in int8:
                    size += weights + _SCALE * _scales(term, survivors, ranks or {})
                else:
                    size += term.nbytes * weights
        size -= sum(self._linears[name].saved for name in self._unsliced.intersection(int8))
        removed = members(self.structure, dropped) if dropped else ()
        units = sum(len(survivors[site]) for site in scored if site not in removed)
        return Amount(params, macs, units, size)

    def limit(self, target: Target, scored: Sequence[str] = ()) -> int:
        """Return how much of the target's metric may remain.

        Raises:
            TargetError: the target is above what the network has.
        """
        total = self.total(target.counted_metric, scored)
        if target.metric != "blocks":
            return target.limit(total)
        n_blocks, macs = self._origin.blocks()
        if not n_blocks:
            raise TargetError(
                f"target.blocks={target.keep}: no block of this network can be dropped, so there "
                "is nothing to count in blocks; set target.macs"
            )
        if target.keep >= n_blocks:
            raise TargetError(f"target.blocks={target.keep}: the network has {n_blocks} blocks")
        return total - math.ceil(target.keep * macs / n_blocks - 1e-6)

    def blocks(self) -> tuple[int, int]:
        """Return the number of blocks with residual branches, and their MACs together."""
        names = {branch.name for branch in self.structure.branches}
        dense = propagate(self.structure, {})
        macs = self.cost_of(dense).macs - self.cost_of(dense, dropped=names).macs
        return len(blocks_of(self.structure)), macs

    def total(self, metric: CountedMetric, scored: Sequence[str] = ()) -> int:
        """Return how much of `metric` the network that targets count from has."""
        origin = self._origin
        return origin.cost_of(propagate(origin.structure, {}), scored).of(metric)

    def plan(self, plan: Plan, scored: Sequence[str] = ()) -> Amount:
        """Return what a plan leaves; `units` counts the kept units of the sites in `scored`."""
        return self.cost_of(
            resolve(self.structure, plan),
            scored,
            ranks_of(self.structure, plan),
            dropped_of(self.structure, plan),
            {edit.linear for edit in plan.int8s()},
        )

    def macs_of_blocks(self, plan: Plan) -> dict[str, int]:
        """Return the MACs that a plan leaves in every block, in network order.

        What lies outside blocks is in none: patch embedding, pooling and classifier.
        """
        survivors, ranks = resolve(self.structure, plan), ranks_of(self.structure, plan)
        dropped = dropped_of(self.structure, plan)
        branches = {branch.name: branch.block for branch in self.structure.branches}
        macs = dict.fromkeys(block_order(self.structure), 0)
        for term in self._terms:
            block = branches.get(term.branch, term.branch)
            if block in macs and term.branch not in dropped:
                macs[block] += term.macs * _weights(term, survivors, ranks)
        return macs

    @property
    def linears(self) -> Collection[str]:
        """The layers that can be int8."""
        return self._linears.keys()

    def positions(self, layer: str) -> int:
        """Return at how many positions of one image a layer is applied."""
        return self._positions[layer]

    def attended(self, plan: Plan) -> Iterator[tuple[int, int, int, int]]:
        """Iterate over the attentions: tokens, context, heads kept, query-key and value dims."""
        survivors, dropped = resolve(self.structure, plan), dropped_of(self.structure, plan)
        for attention in self.structure.attentions:
            if attention.branch in dropped:
                continue
            tokens = self._positions[attention.qkv]
            dims = len(survivors[attention.qk]) + len(survivors[attention.v])
            yield tokens, attention.context or tokens, len(survivors[attention.heads]), dims


@lru_cache(maxsize=4)
def shared_cost(
    net: nn.Module,
    input_size: tuple[int, ...],
    latency_table: Callable[[], TimeModel] | None = None,
) -> Cost:
    """Return the `Cost` of a network that nobody modifies, made once (`shared_skeleton`).

    Arguments as those of `Cost`.
    """
    return Cost(net, input_size, latency_table=latency_table)


def _constants(
    net: nn.Module, described: Structure, terms: Sequence[_Term], weights: Sequence[int]
) -> dict[str, _Constant]:
    """Return what no plan narrows in each branch: its norm and layer scale."""
    constants = {}
    for branch in described.branches:
        modules = [net.get_submodule(path) for path in branch.modules]
        params = sum(tensor.numel() for module in modules for tensor in module.parameters())
        nbytes = sum(t.nbytes for module in modules for t in module.state_dict().values())
        constants[branch.name] = _Constant(params, nbytes)
    for term, n_weights in zip(terms, weights, strict=True):
        if term.branch in constants:
            params, nbytes = constants[term.branch]
            constants[term.branch] = _Constant(
                params - term.params * n_weights, nbytes - term.nbytes * n_weights
            )
    return constants


def _weights(term: _Term, survivors: Kept, ranks: Mapping[str, int]) -> int:
    """Return how many weights, or rows, of a layer are kept."""
    if term.layer is None:
        return width_of(term.out, survivors)
    columns, total = width_of(term.layer.inp, survivors), 0
    for name, out in _matrices(term.layer, ranks).items():
        rows = width_of(out, survivors)
        total += ranks[name] * (rows + columns) if name in ranks else rows * columns
    return total


def _scales(term: _Term, survivors: Kept, ranks: Mapping[str, int]) -> int:
    """Return how many rows an int8 layer has: those of its factors, where it is in two."""
    assert term.layer is not None
    matrices = _matrices(term.layer, ranks)
    return sum(width_of(out, survivors) + ranks.get(name, 0) for name, out in matrices.items())


def _matrices(layer: Layer, ranks: Mapping[str, int]) -> dict[str, Dim]:
    """Return the rows of a layer, or of each of its pieces where one of these has a rank."""
    if ranks and layer.pieces:
        pieces = factorisable_rows(layer)
        del pieces[layer.name]
        if not ranks.keys().isdisjoint(pieces):
            return pieces
    return {layer.name: layer.out}


def _terms(
    net: nn.Module,
    described: Structure,
    positions: Mapping[str, int],
    linears: Collection[str],
) -> Iterator[_Term]:
    for layer in described.layers:
        name = layer.name
        module, weight = net.get_submodule(name), net.get_parameter(f"{name}.weight")
        area, each = math.prod(weight.shape[2 if layer.inp else 1 :]), weight.itemsize
        macs = area * positions[name] if weight.ndim > 1 else 0
        statistics = sum(t.itemsize for t in statistics_of(module))
        yield _Term(
            layer.branch,
            area,
            macs,
            area * each + statistics,
            layer.out,
            layer if layer.inp else None,
            _owner(name, linears),
        )
        if module.bias is not None:
            yield _Term(layer.branch, 1, 0, each, layer.out)
    for table in described.per_head_parameters:
        units = Part(site=table.site, offset=0, size=described.sites[table.site].size)
        parameter = net.get_parameter(table.name)
        area = parameter.numel() // units.size
        yield _Term(table.branch, area, 0, area * parameter.itemsize, (units,))
    dims = {part.site: part for layer in described.layers for part in (*layer.out, *layer.inp)}
    for attention in described.attentions:
        tokens = positions[attention.qkv]
        context = attention.context or tokens
        for site in (attention.qk, attention.v):
            yield _Term(attention.branch, 0, tokens * context, 0, (dims[site],))


def _owner(name: str, linears: Collection[str]) -> str:
    """Return which of `linears` the layer at `name` is, or is a part of; empty if it is none."""
    while name and name not in linears:
        name = name.rpartition(".")[0]
    return name
