"""Blocks that dense compression shrinks, and how far a budget makes it shrink them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain, groupby

import torch

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.errors import ConfigError
from vitrim.network.structure import Layer, Structure, blocks_of
from vitrim.network.survivors import settle

Group = tuple[str, ...]
"""Successive blocks of a stage that are compressed together, by path, in network order."""


def dense_widths(
    cost: Cost, target: Target, order: Sequence[Group], *, extra: int = 0
) -> tuple[dict[str, int], list[str]]:
    """Return hidden widths by block and the blocks without attention: the largest within `target`.

    The fewest groups of `order` that can meet it, and `extra` more, keep the same share of their
    units, or one unit more. So little may have to go that an attention would be too much: then the
    groups at the end of them keep theirs.

    Raises:
        TargetError: not even all of `order` with one unit a block are within `target`.
    """
    described, limit = cost.structure, cost.allowed(target)
    blocks = whole_blocks(described)
    sites = {block: hidden_of(described, blocks[block][1]) for block in _flat(order)}
    sizes = {block: described.sites[site].size for block, site in sites.items()}

    def left(widths: Mapping[str, int], attended: Collection[str]) -> int:
        kept = {sites[block]: torch.arange(width) for block, width in widths.items()}
        dropped = {blocks[block][0] for block in widths if block not in attended}
        amount = cost.of(settle(described, kept), (), None, dropped)
        return int(getattr(amount, target.unit))

    enough = next(
        (
            n
            for n in range(1, len(order) + 1)
            if left(dict.fromkeys(_flat(order[:n]), 1), ()) <= limit
        ),
        None,
    )
    if enough is None:
        lowest = left(dict.fromkeys(_flat(order), 1), ())
        whole = cost.whole(target.unit)
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: compressing all "
            f"{len(order)} candidates ({len(_flat(order))} blocks) leaves {lowest:,} of {whole:,} "
            f"{target.unit} ({lowest / whole:.4f}), not {limit:,}; spare fewer blocks "
            "(method.spare)"
        )
    n = enough + extra
    if n > len(order):
        raise TargetError(
            f"method.extra={extra}: {len(_flat(order[:enough]))} blocks and these are more than "
            f"the {len(order)} candidates ({len(_flat(order))} blocks); set fewer"
        )
    chosen = _flat(order[:n])
    units = sorted(
        ((place + 1) / sizes[block], at, block)
        for at, block in enumerate(chosen)
        for place in range(1, sizes[block])
    )
    ones, full = dict.fromkeys(chosen, 1), {block: sizes[block] for block in chosen}
    attended = next(  # as many attentions go as still leave units to take
        (
            rest
            for rest in (_flat(order[at:n]) for at in range(n, -1, -1))
            if left(ones, rest) <= limit <= left(full, rest)
        ),
        None,
    )
    if attended is None:
        raise TargetError(
            f"target.{target.metric}={target.keep} lies between what {n} candidates with and "
            "without attentions leave; set another target or method.extra"
        )
    low, high = 0, len(units)
    while low < high:  # the most units within the limit
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high)
            if left(_counted(chosen, units[:middle]), attended) <= limit
            else (low, middle - 1)
        )
    return _counted(chosen, units[:low]), [block for block in chosen if block not in attended]


def fewest(cost: Cost, target: Target, order: Sequence[str]) -> list[str]:
    """Return the fewest first blocks of `order` without which `target` is met.

    Raises:
        TargetError: all of them are not enough.
    """
    limit, unit = cost.allowed(target), target.unit
    dense, branches = settle(cost.structure, {}), blocks_of(cost.structure)
    for n in range(len(order) + 1):
        gone = {name for block in order[:n] for name in branches[block]}
        left = getattr(cost.of(dense, dropped=gone), unit)
        if left <= limit:
            return list(order[:n])
    whole = cost.whole(unit)
    raise TargetError(
        f"target.{target.metric}={target.keep} cannot be reached: dropping all "
        f"{len(order)} candidate blocks leaves {left:,} of {whole:,} {unit} "
        f"({left / whole:.4f}), not {limit:,}; spare fewer blocks (method.spare)"
    )


def share_of(cost: Cost, block: str) -> float:
    """Return which share of the MACs goes with `block`."""
    dense = settle(cost.structure, {})
    without = cost.of(dense, dropped=blocks_of(cost.structure)[block]).macs
    return 1 - without / cost.of(dense).macs


def _counted(chosen: Sequence[str], units: Sequence[tuple[float, int, str]]) -> dict[str, int]:
    """Return how many units each block has, the first one that all have included."""
    widths = dict.fromkeys(chosen, 1)
    for _, _, block in units:
        widths[block] += 1
    return widths


def whole_blocks(described: Structure) -> dict[str, tuple[str, str]]:
    """Return the attention and the MLP branch of every block that has these and no others."""
    attentions = {attention.branch for attention in described.attentions}
    return {
        block: (names[0], names[1])
        for block, names in blocks_of(described).items()
        if len(names) == 2 and names[0] in attentions and names[1] not in attentions
    }


def lone_blocks(described: Structure) -> list[str]:
    """Return the blocks that are one branch each, as those of convolutional networks are."""
    return [block for block, names in blocks_of(described).items() if names == [block]]


def groups_of(described: Structure, blocks: Collection[str], together: int) -> list[Group]:
    """Return `blocks`, in network order, in groups of `together` successive ones of a stage.

    A stage is what has one parent and one width of stream. Groups are counted from its first block,
    whichever blocks are asked for: a pair of Swin has plain windows and then shifted ones. One that
    lacks a block, asked for or not there, is left out.
    """
    branches = whole_blocks(described)

    def place(block: str) -> tuple[str, int, int]:
        stage, _, number = block.rpartition(".")
        return stage, _rows(end_of(described, branches[block][1])), int(number) // together

    found = [tuple(group) for _, group in groupby(blocks, key=place)]
    return [group for group in found if len(group) == together]


def _flat(groups: Sequence[Group]) -> list[str]:
    """Return the blocks of groups, one after the other."""
    return [*chain.from_iterable(groups)]


def _rows(end: Layer) -> int:
    """Return how many numbers a token has in the stream that a branch adds to."""
    return sum(part.size for part in end.out)


def end_of(described: Structure, mlp: str) -> Layer:
    """Return the last layer of the MLP branch `mlp`.

    Raises:
        ConfigError: it is in two factors.
    """
    (end,) = next(branch.ends for branch in described.branches if branch.name == mlp)
    layer = next((layer for layer in described.layers if layer.name == end), None)
    if layer is None:
        raise ConfigError(
            f"{end}: units are ranked by the layer that reads them, and this one is in two "
            "factors: compress blocks first and factorise then"
        )
    return layer


def hidden_of(described: Structure, mlp: str) -> str:
    """Return the site of the units that the MLP branch `mlp` reads in its last layer."""
    (site,) = (part.site for part in end_of(described, mlp).inp if part.site is not None)
    return site
