"""What a plan leaves of a network: kept units by site, ranks, dropped branches, slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vitrim.network.structure import Attention, Dim, Layer, Site, Structure, names_in, runs_of
from vitrim.plan import Drop, Keep, LowRank, Plan, PlanError

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
