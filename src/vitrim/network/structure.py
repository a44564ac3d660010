"""What can be cut in a network, said once: slicing, masking and counting all read it here.

A `Layer` names one Linear, Conv or BatchNorm and says which sites its output rows and input columns
belong to. From that follow the slice (`axes_of`), the mask (its complement) and the closed formula
for params and MACs (`target.Cost`). A family module (vit.py, ...) builds the description; nothing
else knows its names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace


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


def runs_of(layer: Layer) -> dict[str, Dim]:
    """Return the rows of what of a layer can be factorised: of the whole, then of its pieces."""
    pieces = zip(layer.pieces, layer.out if layer.pieces else (), strict=True)
    return {layer.name: layer.out, **{f"{layer.name}.{name}": (part,) for name, part in pieces}}


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
