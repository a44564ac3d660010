"""What a plan keeps of a network: units by site, ranks, dropped branches, slices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vitrim.network.structure import (
    Attention,
    Dim,
    Layer,
    Site,
    Structure,
    factorisable_rows,
    members,
)
from vitrim.plan import Drop, Int8, Keep, LowRank, Plan, PlanError

Kept = dict[str, Tensor]
"""Site name -> kept units, int64, ascending, shape (kept,)."""


def resolve(structure: Structure, plan: Plan) -> Kept:
    """Return the units kept at every site, the consequences between sites included.

    A head is removed when its heads-site removes it or when none of its value dims is kept (its
    output is then zero); its query-key dims are removed with it. A head without query-key dims
    stays: it averages over the tokens.

    Raises:
        PlanError: an unknown, locked or out-of-range site, or an attention without any head left.
    """
    for keep in plan.keeps():
        _check_keep(structure, keep)
    return propagate(structure, {keep.site: _tensor(keep.index) for keep in plan.keeps()})


def ranks_of(structure: Structure, plan: Plan) -> dict[str, int]:
    """Return the rank of every layer, or piece of a layer, that the plan factorises.

    Raises:
        PlanError: the layer is unknown, is a factor already or cannot be factorised, or is named
            together with one of its pieces; or the rank is above what its dense size allows.
    """
    ranks = {edit.linear: edit.rank for edit in plan.low_ranks()}
    if not ranks:
        return ranks
    locked = {layer.name: layer.locked_reason for layer in structure.layers if layer.locked_reason}
    limits = {name: limit for layer in structure.layers for name, limit in _max_ranks(layer)}
    for name, rank in ranks.items():
        if name in locked:
            raise PlanError(f"linear {name!r} cannot be factorised: {locked[name]}")
        if name not in limits:
            raise PlanError(f"unknown linear {name!r}: expected one of {similar(name, limits)}")
        if rank > limits[name]:
            raise PlanError(f"linear {name!r}: rank {rank} is above its maximum of {limits[name]}")
        if name.rpartition(".")[0] in ranks:
            raise PlanError(f"linear {name!r} is factorised together with the layer it is part of")
    return ranks


def dropped_of(structure: Structure, plan: Plan) -> frozenset[str]:
    """Return the branches that the plan drops.

    Raises:
        PlanError: a branch is unknown, or another edit is inside a dropped branch.
    """
    known = [branch.name for branch in structure.branches]
    dropped = frozenset(edit.branch for edit in plan.drops())
    for name in sorted(dropped.difference(known)):
        raise PlanError(f"unknown branch {name!r}: expected one of {similar(name, known)}")
    inside = members(structure, dropped)
    for edit in plan.edits:
        if not isinstance(edit, Drop) and (address := _address(edit)) in inside:
            raise PlanError(f"{address!r} is edited, but its branch is dropped")
    return dropped


def _address(edit: Keep | LowRank | Int8) -> str:
    return edit.site if isinstance(edit, Keep) else edit.linear


def similar(name: str, known: Iterable[str]) -> str:
    """Return up to 12 known names, those with the same last part as `name` if there are any."""
    names = [*known]
    similar = [other for other in names if other.split(".")[-1] == name.split(".")[-1]]
    return ", ".join((similar or names)[:12])


def _max_ranks(layer: Layer) -> Iterator[tuple[str, int]]:
    """Iterate over the names and highest ranks of a layer and its pieces."""
    if layer.factor or layer.locked_reason:
        return
    columns = sum(part.size for part in layer.inp)
    for name, out in factorisable_rows(layer).items():
        yield name, min(sum(part.size for part in out), columns)


def _tensor(index: Sequence[int]) -> Tensor:
    """Return torch.tensor(index), eight times faster."""
    return torch.from_numpy(np.fromiter(index, dtype=np.int64))


def propagate(structure: Structure, kept: Mapping[str, Tensor]) -> Kept:
    """Complete `kept` to every site, with the consequences that `resolve` describes."""
    survivors = {
        name: kept[name] if name in kept else torch.arange(site.size)
        for name, site in structure.sites.items()
    }
    for attention in structure.attentions:
        if not kept.keys().isdisjoint((attention.heads, attention.qk, attention.v)):
            _align_heads(structure, attention, survivors)
    return survivors


def to_edits(
    structure: Structure, survivors: Kept, requested: Mapping[str, Tensor]
) -> tuple[Keep, ...]:
    """Return the edits that lead to `survivors`, one per site that loses units.

    `requested` holds the units kept before the consequences. It is used for a query-key site whose
    kept dims all belong to removed heads: the site has no survivors, and a Keep cannot be empty.
    """
    kept = {
        name: index if len(index) else requested.get(name, index)
        for name, index in survivors.items()
    }
    return tuple(
        Keep(site=site.name, index=tuple(kept[site.name].tolist()))
        for site in structure.sites.values()
        if 0 < len(kept[site.name]) < site.size and not site.locked_reason
    )


def _align_heads(structure: Structure, attention: Attention, survivors: Kept) -> None:
    """Make heads, query-key dims and value dims of one attention consistent, in place."""
    qk_head = head_of(structure.sites[attention.qk])
    v_head = head_of(structure.sites[attention.v])
    v_index = survivors[attention.v]
    v_index = v_index[torch.isin(v_head[v_index], survivors[attention.heads])]
    if not len(v_index):
        raise PlanError(
            f"{attention.branch}: no kept head has a value dim; Drop the branch instead"
        )
    heads = torch.bincount(v_head[v_index]).nonzero()[:, 0]
    qk_index = survivors[attention.qk]
    survivors[attention.heads] = heads
    survivors[attention.v] = v_index
    survivors[attention.qk] = qk_index[torch.isin(qk_head[qk_index], heads)]


def head_of(site: Site) -> Tensor:
    """Return the head that each unit of a query-key or value site belongs to, shape (size,)."""
    # NumPy: torch.repeat_interleave uses every thread, which costs milliseconds on a busy machine
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
    removed = torch.ones(size, dtype=torch.bool)
    removed[kept] = False
    return removed


def _check_keep(structure: Structure, keep: Keep) -> None:
    name = keep.site
    site = structure.sites.get(name)
    if site is None:
        raise PlanError(f"unknown site {name!r}: expected one of {similar(name, structure.sites)}")
    if site.locked_reason:
        raise PlanError(f"site {name!r} cannot be cut exactly: {site.locked_reason}")
    if keep.index[-1] >= site.size:
        raise PlanError(
            f"site {name!r}: index {keep.index[-1]} is out of range, the site has {site.size} units"
        )
