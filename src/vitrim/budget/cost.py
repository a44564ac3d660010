"""The closed formula of a network: params and MACs from the widths that a plan leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import nn

from vitrim.budget.latency import Timing
from vitrim.budget.target import Target, TargetError
from vitrim.measure import InputSize, census
from vitrim.network import structure
from vitrim.network.structure import Dim, Layer, Part, Structure, blocks_of, names_in, runs_of
from vitrim.network.survivors import Survivors, dropped_of, ranks_of, resolve, settle, width_of
from vitrim.plan import Plan


class Amount(NamedTuple):
    """What a plan leaves: exact integers, the same that counting the cut network gives."""

    params: int
    macs: int
    units: int


class _Term(NamedTuple):
    branch: str
    params: int
    macs: int
    out: Dim
    layer: Layer | None = None  # whose columns count too


class Cost:
    """The closed formula of one network: params and MACs from the widths that a plan leaves.

    Each Linear is rows x columns weights, or rank x (rows + columns) in two factors, applied at its
    positions. A Conv has a kernel in place of each weight, and of each row where it is depthwise;
    norms make no MACs. Each attention is its context times its query-key and value dims at every
    token; whatever is never cut is a constant. Of a network that was cut before, `origin` is the
    cost of the one that budgets count from. `timing` gives the
    table of times on this device, and measures it when first asked.
    """

    def __init__(
        self,
        net: nn.Module,
        input_size: InputSize,
        origin: Cost | None = None,
        timing: Callable[[], Timing] | None = None,
    ) -> None:
        self.timing = timing
        self.structure: Structure = structure(net)
        self.input_size = input_size
        self._whole = origin or self
        applied = {layer.name: layer.beside or layer.name for layer in self.structure.layers}
        applied |= {attention.qkv: attention.qkv for attention in self.structure.attentions}
        self.dense_count, found = census(net, input_size, [*dict.fromkeys(applied.values())])
        self._positions = positions = {name: found[at] for name, at in applied.items()}
        self._terms = list(_terms(net, self.structure, positions))
        self._params = self._macs = 0
        dense = settle(self.structure, {})
        whole = self.of(dense)
        self._params = self.dense_count.params - whole.params
        self._macs = self.dense_count.macs - whole.macs
        self._own = {
            branch.name: sum(
                tensor.numel()
                for path in branch.modules
                for tensor in net.get_submodule(path).parameters()
            )
            - sum(
                term.params * _weights(term, dense, {})
                for term in self._terms
                if term.branch == branch.name
            )
            for branch in self.structure.branches
        }

    def of(
        self,
        survivors: Survivors,
        scored: Sequence[str] = (),
        ranks: Mapping[str, int] | None = None,
        dropped: Collection[str] = (),
    ) -> Amount:
        """Return what remains; `units` counts the kept units of the sites in `scored`.

        `ranks` holds the layers (or pieces of layers) in two factors, `dropped` the branches that
        are not there any more, with their norms and layer scales.
        """
        params, macs = self._params - sum(self._own[name] for name in dropped), self._macs
        for term in self._terms:
            if term.branch not in dropped:
                weights = _weights(term, survivors, ranks or {})
                params += term.params * weights
                macs += term.macs * weights
        gone = names_in(self.structure, dropped) if dropped else ()
        return Amount(params, macs, sum(len(survivors[s]) for s in scored if s not in gone))

    def allowed(self, target: Target, scored: Sequence[str] = ()) -> int:
        """Return how much of the target's metric may remain.

        Raises:
            TargetError: more is asked for than there is.
        """
        whole = self.whole(target.unit, scored)
        if target.metric != "blocks":
            return target.limit(whole)
        n_blocks, macs = self._whole.blocks()
        if target.keep >= n_blocks:
            raise TargetError(f"target.blocks={target.keep}: the network has {n_blocks} blocks")
        return whole - math.ceil(target.keep * macs / n_blocks - 1e-6)

    def blocks(self) -> tuple[int, int]:
        """Return how many blocks with residual branches there are, and their MACs in all."""
        names = {branch.name for branch in self.structure.branches}
        dense = settle(self.structure, {})
        macs = self.of(dense).macs - self.of(dense, dropped=names).macs
        return len(blocks_of(self.structure)), macs

    def whole(self, metric: Literal["macs", "params", "units"], scored: Sequence[str] = ()) -> int:
        """Return how much of `metric` there is in the network that budgets count from."""
        origin = self._whole
        return int(getattr(origin.of(settle(origin.structure, {}), scored), metric))

    def plan(self, plan: Plan, scored: Sequence[str] = ()) -> Amount:
        """Return what a plan leaves; `units` counts the kept units of the sites in `scored`."""
        ranks = ranks_of(self.structure, plan)
        return self.of(
            resolve(self.structure, plan), scored, ranks, dropped_of(self.structure, plan)
        )

    def positions(self, layer: str) -> int:
        """Return at how many positions of one image a layer is applied."""
        return self._positions[layer]

    def attended(self, plan: Plan) -> Iterator[tuple[int, int, int, int]]:
        """Iterate over the attentions: tokens, tokens attended to, heads left, q-k and v dims."""
        left, dropped = resolve(self.structure, plan), dropped_of(self.structure, plan)
        for attention in self.structure.attentions:
            if attention.branch in dropped:
                continue
            tokens = self._positions[attention.qkv]
            dims = len(left[attention.qk]) + len(left[attention.v])
            yield tokens, attention.context or tokens, len(left[attention.heads]), dims


def _weights(term: _Term, survivors: Survivors, ranks: Mapping[str, int]) -> int:
    """Return how many weights a layer has left."""
    if term.layer is None:
        return width_of(term.out, survivors)
    columns = width_of(term.layer.inp, survivors)
    runs, total = {term.layer.name: term.out}, 0
    if ranks and term.layer.pieces:
        pieces = runs_of(term.layer)
        del pieces[term.layer.name]
        runs = runs if ranks.keys().isdisjoint(pieces) else pieces
    for name, out in runs.items():
        rows = width_of(out, survivors)
        total += ranks[name] * (rows + columns) if name in ranks else rows * columns
    return total


def _terms(net: nn.Module, described: Structure, positions: Mapping[str, int]) -> Iterator[_Term]:
    for layer in described.layers:
        name = layer.name
        weight = net.get_parameter(f"{name}.weight")
        area = math.prod(weight.shape[2 if layer.inp else 1 :])
        macs = area * positions[name] if weight.ndim > 1 else 0
        yield _Term(layer.branch, area, macs, layer.out, layer if layer.inp else None)
        if net.get_submodule(name).bias is not None:
            yield _Term(layer.branch, 1, 0, layer.out)
    for table in described.tables:
        units = Part(site=table.site, offset=0, size=described.sites[table.site].size)
        yield _Term(table.branch, net.get_parameter(table.name).numel() // units.size, 0, (units,))
    dims = {part.site: part for layer in described.layers for part in (*layer.out, *layer.inp)}
    for attention in described.attentions:
        tokens = positions[attention.qkv]
        context = attention.context or tokens
        for site in (attention.qk, attention.v):
            yield _Term(attention.branch, 0, tokens * context, (dims[site],))
