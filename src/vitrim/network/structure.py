"""The description of what can be cut in a network; slicing, masking and counting all read it.

A `Layer` names one Linear, Conv or BatchNorm and states which sites its output rows and input
columns belong to. The slice (`survivors.axes_of`), the mask (its complement) and the formula for
params and MACs (`budget.cost.Cost`) follow from that. A family module (family/vit.py, ...) builds
the description; no other module knows timm's attribute names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["input", "heads", "qk", "v", "hidden", "channels"]
"""What the units of a site are.

`input`: columns of the layers that read the output of one norm; `heads`: attention heads; `qk` and
`v`: query-key and value dims of heads; `hidden`: hidden units of an MLP; `channels`: channels
between two convolutions.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A set of `size` interchangeable units of one kind; each can be kept or removed.

    `head_dims` holds the width of every head, in order, where the units are dims of heads.
    `locked_reason` is empty, or states why the site of this network cannot be cut exactly.
    """

    name: str
    kind: Kind
    size: int
    head_dims: tuple[int, ...] = ()
    locked_reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A run of `size` rows or columns from `offset`, one per unit of `site` (None: never cut)."""

    site: str | None
    offset: int
    size: int


Dim = tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A module with a weight: the sites of its rows (`out`) and of its columns (`inp`).

    Args:
        name: the module path.
        branch: the path of the branch that the layer is in.
        out: the parts of its rows.
        inp: the parts of its columns; empty for a BatchNorm and for a depthwise Conv, where every
            row belongs to one channel.
        gathers: whether its input keeps the dense width, so that a cut layer selects columns.
        pieces: names of the parts of `out` where each could be a layer of its own.
        factor: whether this is one of the two factors of a low-rank layer.
        locked_reason: empty, or why the layer cannot be factorised.
        positions_from: empty, or the layer that is applied at the same positions, where the network
            reads the weight without calling the layer.
    """

    name: str
    branch: str
    out: Dim
    inp: Dim
    gathers: bool = False
    pieces: tuple[str, ...] = ()
    factor: bool = False
    locked_reason: str = ""
    positions_from: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """One self-attention: the sites of its heads, query-key dims and value dims.

    `qkv` is the layer whose positions are the tokens; `context` is the number of tokens that each
    token attends to (None: all of them).
    """

    branch: str
    qkv: str
    heads: str
    qk: str
    v: str
    context: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PerHeadParameter:
    """A parameter outside all layers with one entry per unit of `site` along `axis`."""

    name: str
    branch: str
    site: str
    axis: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidualBranch:
    """A branch f of x + f(x), which can be dropped.

    `block` is the path of the block that contains it (its own path where the branch is the whole
    block); `modules` are the paths of its modules, norm and layer scale included. The branch adds
    nothing once all parameters at `ends` are zero.
    """

    name: str
    block: str
    modules: tuple[str, ...]
    ends: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """Everything that can be cut in one network."""

    sites: Mapping[str, Site]
    branches: tuple[ResidualBranch, ...] = ()
    layers: tuple[Layer, ...] = ()
    attentions: tuple[Attention, ...] = ()
    per_head_parameters: tuple[PerHeadParameter, ...] = ()


def of_kind(structure: Structure, *kinds: Kind) -> list[Site]:
    """Return the sites of the given kinds in network order, locked sites included."""
    return [site for site in structure.sites.values() if site.kind in kinds]


def cuttable_channels(structure: Structure, kinds: Collection[Kind]) -> list[str]:
    """Return the names of the sites of the given kinds that can be cut, in network order.

    Hidden units are those of MLPs whose name is `mlp`: MLP-Mixers have none.
    """
    return [
        site.name
        for site in of_kind(structure, *kinds)
        if not site.locked_reason and (site.kind != "hidden" or site.name.endswith("mlp.hidden"))
    ]


def blocks_of(structure: Structure) -> dict[str, list[str]]:
    """Return the branches of every block, by the block's path, in network order."""
    blocks: dict[str, list[str]] = {}
    for branch in structure.branches:
        blocks.setdefault(branch.block, []).append(branch.name)
    return blocks


def block_order(structure: Structure) -> list[str]:
    """Return the paths of all blocks in network order, blocks without a branch included."""
    blocks = {branch.name: branch.block for branch in structure.branches}
    paths = (blocks.get(layer.branch, layer.branch) for layer in structure.layers)
    return [*dict.fromkeys(path for path in paths if path)]


def members(structure: Structure, branches: Collection[str]) -> set[str]:
    """Return the names of the sites, layers and pieces of layers inside the given branches."""
    layers = [layer for layer in structure.layers if layer.branch in branches]
    names = {name for layer in layers for name in factorisable_rows(layer)}
    names |= {part.site for layer in layers for part in (*layer.out, *layer.inp) if part.site}
    return names | {item.heads for item in structure.attentions if item.branch in branches}


def factorisable_rows(layer: Layer) -> dict[str, Dim]:
    """Return the rows that can be factorised, by name: those of the layer, then of its pieces."""
    pieces = zip(layer.pieces, layer.out if layer.pieces else (), strict=True)
    return {layer.name: layer.out, **{f"{layer.name}.{name}": (part,) for name, part in pieces}}


def ends_of(structure: Structure) -> dict[str, str]:
    """Return, by branch, the path of the layer whose output is added to the stream."""
    return {
        layer.branch: layer.name
        for layer in structure.layers
        if all(part.site is None for part in layer.out)
        and not (layer.factor and layer.name.endswith(".down"))
    }


def full(size: int) -> Dim:
    """Return a dimension that is never cut."""
    return (Part(site=None, offset=0, size=size),)


def joined(parts: Sequence[Structure]) -> Structure:
    """Return one structure with the contents of several."""
    return Structure(
        sites={name: site for part in parts for name, site in part.sites.items()},
        branches=tuple(branch for part in parts for branch in part.branches),
        layers=tuple(layer for part in parts for layer in part.layers),
        attentions=tuple(attention for part in parts for attention in part.attentions),
        per_head_parameters=tuple(item for part in parts for item in part.per_head_parameters),
    )


def prefixed(structure: Structure, prefix: str) -> Structure:
    """Return the structure of a network that holds the described one at module path `prefix`."""
    sites = [replace(site, name=prefix + site.name) for site in structure.sites.values()]
    return Structure(
        sites={site.name: site for site in sites},
        branches=tuple(
            ResidualBranch(
                name=prefix + branch.name,
                block=prefix + branch.block,
                modules=tuple(prefix + path for path in branch.modules),
                ends=tuple(prefix + path for path in branch.ends),
            )
            for branch in structure.branches
        ),
        layers=tuple(_prefixed_layer(layer, prefix) for layer in structure.layers),
        attentions=tuple(
            replace(
                attention,
                branch=prefix + attention.branch,
                qkv=prefix + attention.qkv,
                heads=prefix + attention.heads,
                qk=prefix + attention.qk,
                v=prefix + attention.v,
            )
            for attention in structure.attentions
        ),
        per_head_parameters=tuple(
            replace(
                item,
                name=prefix + item.name,
                branch=prefix + item.branch,
                site=prefix + item.site,
            )
            for item in structure.per_head_parameters
        ),
    )


def _prefixed_layer(layer: Layer, prefix: str) -> Layer:
    return replace(
        layer,
        name=prefix + layer.name,
        branch=prefix + layer.branch,
        out=_prefixed_dim(layer.out, prefix),
        inp=_prefixed_dim(layer.inp, prefix),
        positions_from=layer.positions_from and prefix + layer.positions_from,
    )


def _prefixed_dim(dim: Dim, prefix: str) -> Dim:
    return tuple(
        part if part.site is None else replace(part, site=prefix + part.site) for part in dim
    )
