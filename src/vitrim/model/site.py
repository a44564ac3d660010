"""What can be cut in a network, said once: slicing, masking and counting all read it here.

A `Layer` names one Linear, Conv or BatchNorm and says which sites its output rows and input columns
belong to. From that follow the slice (`axes_of`), the mask (its complement) and the closed formula
for params and MACs (`target.Cost`). A family module (vit.py, ...) builds the description; nothing
else knows its names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vitrim.plan import Drop, Keep, LowRank, Plan, PlanError


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A set of `size` interchangeable units that can be kept or removed one by one.

    `head_dims` holds the width of every head, in order, where the units are dims of heads.
    `locked` is empty, or the reason why this network's site cannot be cut exactly.
    """

    name: str
    size: int
    head_dims: tuple[int, ...] = ()
    locked: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A run of `size` rows or columns from `offset`, one per unit of `site` (None: never cut)."""

    site: str | None
    offset: int
    size: int


Dim = tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A module with a weight: rows by `out`, columns by `inp`; `gathers` if its input stays wide.

    `inp` is empty where every row is of its own channel: in a BatchNorm, and in a depthwise Conv.
    `pieces` names the parts of `out` where each could be a layer of its own. `factor` marks one of
    the two that a low-rank layer consists of; `locked` is empty, or the reason why there can be no
    factors in this layer's place. `beside` is empty, or a layer that is applied at the same
    positions, where the network reads the weight without calling the layer.
    """

    name: str
    branch: str
    out: Dim
    inp: Dim
    gathers: bool = False
    pieces: tuple[str, ...] = ()
    factor: bool = False
    locked: str = ""
    beside: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """One self-attention: the sites of its heads, query-key dims and value dims.

    `qkv` is the layer whose positions are the tokens; `context` how many tokens each one attends
    to (None: all of them).
    """

    branch: str
    qkv: str
    heads: str
    qk: str
    v: str
    context: int | None = None


_NAMES = ("branch", "qkv", "heads", "qk", "v")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A parameter of no layer that has, along `axis`, one entry per unit of `site`."""

    name: str
    branch: str
    site: str
    axis: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """A branch f of x + f(x), which can be dropped.

    `block` is the path of the block that it is in (its own where it is all of it); `modules` are
    the paths that are its own, norm and layer scale included; once all parameters at `ends` are
    zero, it adds nothing.
    """

    name: str
    block: str
    modules: tuple[str, ...]
    ends: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """Everything that can be cut in one network."""

    sites: Mapping[str, Site]
    branches: tuple[Residual, ...] = ()
    layers: tuple[Layer, ...] = ()
    attentions: tuple[Attention, ...] = field(default=())
    tables: tuple[Table, ...] = ()


Survivors = dict[str, Tensor]
"""Site name -> kept units, int64, ascending, shape (kept,)."""


def resolve(structure: Structure, plan: Plan) -> Survivors:
    """Return what survives at every site, the consequences between sites included.

    A head goes when its heads-site drops it or when none of its value dims is left (its output is
    then zero); its query-key dims go with it. A head without query-key dims stays: it averages.

    Raises:
        PlanError: an unknown, locked or out-of-range site, or an attention without any head left.
    """
    for keep in plan.keeps():
        _check(structure, keep)
    return settle(structure, {keep.site: _tensor(keep.index) for keep in plan.keeps()})


def ranks_of(structure: Structure, plan: Plan) -> dict[str, int]:
    """Return the rank of every layer, or piece of a layer, that the plan factorises.

    Raises:
        PlanError: no such layer, it is a factor already or none can stand in its place, it is named
            whole and in pieces, or the rank is above what its dense size allows.
    """
    ranks = {edit.linear: edit.rank for edit in plan.low_ranks()}
    if not ranks:
        return ranks
    locked = {layer.name: layer.locked for layer in structure.layers if layer.locked}
    most = {name: limit for layer in structure.layers for name, limit in _most(layer).items()}
    for name, rank in ranks.items():
        if name in locked:
            raise PlanError(f"linear {name!r} cannot be factorised: {locked[name]}")
        if name not in most:
            near = [other for other in most if other.split(".")[-1] == name.split(".")[-1]]
            raise PlanError(
                f"unknown linear {name!r}: expected one of {', '.join((near or [*most])[:12])}"
            )
        if rank > most[name]:
            raise PlanError(f"linear {name!r}: rank {rank} is above the {most[name]} it can have")
        if name.rpartition(".")[0] in ranks:
            raise PlanError(f"linear {name!r} is factorised with the layer that it is a piece of")
    return ranks


def dropped_of(structure: Structure, plan: Plan) -> frozenset[str]:
    """Return the branches that the plan drops.

    Raises:
        PlanError: no such branch, or another edit is inside a dropped one.
    """
    known = [branch.name for branch in structure.branches]
    dropped = frozenset(edit.branch for edit in plan.drops())
    for name in sorted(dropped.difference(known)):
        near = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
        raise PlanError(
            f"unknown branch {name!r}: expected one of {', '.join((near or known)[:12])}"
        )
    inside = names_in(structure, dropped)
    for edit in plan.edits:
        if not isinstance(edit, Drop) and (place := _place(edit)) in inside:
            raise PlanError(f"{place!r} is edited, but its branch is dropped")
    return dropped


def blocks_of(structure: Structure) -> dict[str, list[str]]:
    """Return the branches of every block, by the block's path, in network order."""
    blocks: dict[str, list[str]] = {}
    for branch in structure.branches:
        blocks.setdefault(branch.block, []).append(branch.name)
    return blocks


def order_of(structure: Structure) -> list[str]:
    """Return the paths of all blocks in network order, those included that have no branch."""
    blocks = {branch.name: branch.block for branch in structure.branches}
    named = (blocks.get(layer.branch, layer.branch) for layer in structure.layers)
    return [*dict.fromkeys(name for name in named if name)]


def names_in(structure: Structure, branches: Collection[str]) -> set[str]:
    """Return the sites, layers and pieces of layers that are inside some branches."""
    layers = [layer for layer in structure.layers if layer.branch in branches]
    found = {name for layer in layers for name in runs_of(layer)}
    found |= {part.site for layer in layers for part in (*layer.out, *layer.inp) if part.site}
    return found | {item.heads for item in structure.attentions if item.branch in branches}


def _place(edit: Keep | LowRank) -> str:
    return edit.site if isinstance(edit, Keep) else edit.linear


def _most(layer: Layer) -> dict[str, int]:
    """Return the highest rank of a layer and of its pieces, by name."""
    if layer.factor or layer.locked:
        return {}
    columns = sum(part.size for part in layer.inp)
    return {
        name: min(sum(part.size for part in out), columns) for name, out in runs_of(layer).items()
    }


def runs_of(layer: Layer) -> dict[str, Dim]:
    """Return the rows of what of a layer can be factorised: of the whole, then of its pieces."""
    pieces = zip(layer.pieces, layer.out if layer.pieces else (), strict=True)
    return {layer.name: layer.out, **{f"{layer.name}.{name}": (part,) for name, part in pieces}}


def _tensor(index: Sequence[int]) -> Tensor:
    """Return what torch.tensor(index) does, eight times as fast."""
    return torch.from_numpy(np.fromiter(index, dtype=np.int64))


def settle(structure: Structure, kept: Mapping[str, Tensor]) -> Survivors:
    """Complete `kept` to every site, with the consequences that `resolve` describes."""
    survivors = {
        name: kept[name] if name in kept else torch.arange(site.size)
        for name, site in structure.sites.items()
    }
    for attention in structure.attentions:
        if not kept.keys().isdisjoint((attention.heads, attention.qk, attention.v)):
            _spread(structure, attention, survivors)
    return survivors


def as_keeps(
    structure: Structure, survivors: Survivors, asked: Mapping[str, Tensor]
) -> tuple[Keep, ...]:
    """Return the edits that lead to `survivors`, one per site that loses units.

    `asked` is what was kept before the consequences: a query-key site whose every kept dim is of a
    removed head has no survivor, and is said by what was asked for.
    """
    kept = {
        name: index if len(index) else asked.get(name, index) for name, index in survivors.items()
    }
    return tuple(
        Keep(site=site.name, index=tuple(kept[site.name].tolist()))
        for site in structure.sites.values()
        if 0 < len(kept[site.name]) < site.size and not site.locked
    )


def _spread(structure: Structure, attention: Attention, survivors: Survivors) -> None:
    """Make heads, query-key dims and value dims of one attention consistent, in place."""
    qk_head = head_of(structure.sites[attention.qk])
    v_head = head_of(structure.sites[attention.v])
    v_index = survivors[attention.v]
    v_index = v_index[torch.isin(v_head[v_index], survivors[attention.heads])]
    if not len(v_index):
        raise PlanError(
            f"{attention.branch}: no head with a value dim left; Drop the branch instead"
        )
    heads = torch.bincount(v_head[v_index]).nonzero()[:, 0]
    qk_index = survivors[attention.qk]
    survivors[attention.heads] = heads
    survivors[attention.v] = v_index
    survivors[attention.qk] = qk_index[torch.isin(qk_head[qk_index], heads)]


def head_of(site: Site) -> Tensor:
    """Return the head that each unit of a query-key or value site belongs to, shape (size,)."""
    # by NumPy: torch.repeat_interleave wakes every thread, milliseconds a call on a busy machine
    return torch.from_numpy(np.repeat(np.arange(len(site.head_dims)), site.head_dims))


def index_of(dim: Dim, survivors: Mapping[str, Tensor]) -> Tensor:
    """Return the kept rows (or columns) of a layer's dimension, ascending, shape (kept,)."""
    return torch.cat(
        [
            part.offset + (torch.arange(part.size) if part.site is None else survivors[part.site])
            for part in dim
        ]
    )


def axes_of(layer: Layer, survivors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the kept rows of a layer and, where it has any, its kept columns."""
    return tuple(index_of(dim, survivors) for dim in (layer.out, layer.inp) if dim)


def width_of(dim: Dim, survivors: Mapping[str, Tensor]) -> int:
    """Return how many rows (or columns) of a layer's dimension are kept."""
    return sum(part.size if part.site is None else len(survivors[part.site]) for part in dim)


def widths_of(site: Site, survivors: Mapping[str, Tensor]) -> Tensor:
    """Return how many dims of every head of a query-key or value site are kept, (heads,)."""
    return torch.bincount(head_of(site)[survivors[site.name]], minlength=len(site.head_dims))


def removed_of(size: int, kept: Tensor) -> Tensor:
    """Return which of `size` units are not in `kept`, bool, shape (size,)."""
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone


def full(size: int) -> Dim:
    """Return a dimension that is never cut."""
    return (Part(site=None, offset=0, size=size),)


def joined(parts: Sequence[Structure]) -> Structure:
    """Return one structure of several."""
    return Structure(
        sites={name: site for part in parts for name, site in part.sites.items()},
        branches=tuple(branch for part in parts for branch in part.branches),
        layers=tuple(layer for part in parts for layer in part.layers),
        attentions=tuple(attention for part in parts for attention in part.attentions),
        tables=tuple(table for part in parts for table in part.tables),
    )


def prefixed(structure: Structure, prefix: str) -> Structure:
    """Return the structure of a network that holds the described one at module path `prefix`."""

    def dim(parts: Dim) -> Dim:
        return tuple(
            part if part.site is None else replace(part, site=prefix + part.site) for part in parts
        )

    def inside(attention: Attention) -> Attention:
        names = {name: prefix + getattr(attention, name) for name in _NAMES}
        return replace(attention, **names)

    return Structure(
        sites={
            prefix + name: replace(site, name=prefix + name)
            for name, site in structure.sites.items()
        },
        branches=tuple(
            Residual(
                name=prefix + branch.name,
                block=prefix + branch.block,
                modules=tuple(prefix + path for path in branch.modules),
                ends=tuple(prefix + path for path in branch.ends),
            )
            for branch in structure.branches
        ),
        layers=tuple(
            replace(
                layer,
                name=prefix + layer.name,
                branch=prefix + layer.branch,
                out=dim(layer.out),
                inp=dim(layer.inp),
                beside=layer.beside and prefix + layer.beside,
            )
            for layer in structure.layers
        ),
        attentions=tuple(inside(attention) for attention in structure.attentions),
        tables=tuple(
            replace(
                table,
                name=prefix + table.name,
                branch=prefix + table.branch,
                site=prefix + table.site,
            )
            for table in structure.tables
        ),
    )


def _check(structure: Structure, keep: Keep) -> None:
    name, kind = keep.site, keep.site.split(".")[-1]
    site = structure.sites.get(name)
    if site is None:
        near = [other for other in structure.sites if other.split(".")[-1] == kind]
        raise PlanError(
            f"unknown site {name!r}: expected one of {', '.join((near or [*structure.sites])[:12])}"
        )
    if site.locked:
        raise PlanError(f"site {name!r} cannot be cut exactly: {site.locked}")
    if keep.index[-1] >= site.size:
        raise PlanError(
            f"site {name!r}: index {keep.index[-1]} is out of range, the site has {site.size} units"
        )
