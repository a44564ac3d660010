"""Which blocks a target needs: blocks that are dropped, and blocks that are made narrow.

Dense compression (DC-ViT) removes the attention of a few blocks and most units of their MLPs. The
functions here say how many blocks it takes, in a given order, and how many units they may keep.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, groupby

import torch

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.errors import ConfigError, is_count
from vitrim.network.structure import Layer, Structure, blocks_of
from vitrim.network.survivors import propagate

Group = tuple[str, ...]
"""Successive blocks of a stage that are compressed together, by path, in network order."""

PROTECTED = "two whole numbers: of first and of last blocks that are not changed"
"""What `is_protected` allows, for messages."""


def is_protected(value: Sequence[int]) -> bool:
    """Whether `value` says how many first and how many last blocks are protected.

    >>> is_protected([1, 0]), is_protected([1]), is_protected([1, -1])
    (True, False, False)
    """
    return len(value) == 2 and all(n == 0 or is_count(n) for n in value)


class _Remaining:
    """How much of the target's metric remains once some blocks are compressed."""

    def __init__(self, cost: Cost, target: Target, blocks: Sequence[str]) -> None:
        branches = whole_blocks(cost.structure)
        self.cost = cost
        self.metric = target.counted_metric
        self.limit = cost.limit(target)
        self.attentions = {block: branches[block][0] for block in blocks}
        self.sites = {block: hidden_of(cost.structure, branches[block][1]) for block in blocks}
        self.sizes = {block: cost.structure.sites[site].size for block, site in self.sites.items()}

    def of(self, widths: Mapping[str, int], attended: Collection[str] = ()) -> int:
        """Return what remains at hidden `widths` by block; `attended` keep their attention."""
        kept = {self.sites[block]: torch.arange(width) for block, width in widths.items()}
        dropped = {self.attentions[block] for block in widths if block not in attended}
        survivors = propagate(self.cost.structure, kept)
        return self.cost.cost_of(survivors, dropped=dropped).of(self.metric)


def fewest_groups(cost: Cost, target: Target, order: Sequence[Group], *, hint: str) -> int:
    """Return how many of the first groups of `order` can meet `target`, at one unit a block.

    Args:
        cost: of the network.
        target: what may remain.
        order: the groups, those to compress first at the front.
        hint: what the user can do if none of it is enough, for the message.

    Raises:
        TargetError: not even all of `order` with one unit a block are within `target`.
    """
    remaining = _Remaining(cost, target, flatten(order))
    for n in range(1, len(order) + 1):
        if remaining.of(dict.fromkeys(flatten(order[:n]), 1)) <= remaining.limit:
            return n
    blocks = flatten(order)
    lowest = remaining.of(dict.fromkeys(blocks, 1))
    raise TargetError(
        f"target.{target.metric}={target.keep} cannot be reached: compressing all "
        f"{len(order)} candidates ({len(blocks)} blocks) leaves "
        f"{_shortfall(cost, target, lowest)}; {hint}"
    )


def dense_widths(
    cost: Cost, target: Target, groups: Sequence[Group]
) -> tuple[dict[str, int], list[str]]:
    """Return hidden widths by block and the blocks without attention: the largest within `target`.

    `groups` must be enough to meet the target (`fewest_groups`). All their blocks keep the same
    share of their units, to within one unit. Where so little has to be removed that a whole
    attention would be too much, the groups at the end keep theirs.

    Raises:
        TargetError: removing attentions is too much, and removing units alone is not enough.
    """
    blocks = flatten(groups)
    remaining = _Remaining(cost, target, blocks)
    attended = _attended(remaining, groups)
    if attended is None:
        raise TargetError(
            f"target.{target.metric}={target.keep} is between what {len(groups)} candidates leave "
            "with and without their attentions; set another target or compress other blocks"
        )
    units = sorted(
        ((unit + 1) / remaining.sizes[block], position, block)
        for position, block in enumerate(blocks)
        for unit in range(1, remaining.sizes[block])
    )

    def amount(n: int) -> int:
        """Return what remains with the first `n` of `units`."""
        return remaining.of(_widths(blocks, units[:n]), attended)

    # n = 0, one unit a block, is within the limit in any case: `_attended` has checked that
    n = bisect_right(range(1, len(units) + 1), remaining.limit, key=amount)
    return _widths(blocks, units[:n]), [block for block in blocks if block not in attended]


def _attended(remaining: _Remaining, groups: Sequence[Group]) -> list[str] | None:
    """Return the blocks that keep their attention: as few as leave units to choose from."""
    blocks = flatten(groups)
    narrowest = dict.fromkeys(blocks, 1)
    for start in range(len(groups), -1, -1):
        attended = flatten(groups[start:])
        least = remaining.of(narrowest, attended)
        if least <= remaining.limit <= remaining.of(remaining.sizes, attended):
            return attended
    return None


def _widths(blocks: Sequence[str], units: Sequence[tuple[float, int, str]]) -> dict[str, int]:
    """Return how many units each block keeps: one, and those of it among `units`."""
    widths = dict.fromkeys(blocks, 1)
    for _, _, block in units:
        widths[block] += 1
    return widths


def fewest(cost: Cost, target: Target, order: Sequence[str], *, hint: str) -> list[str]:
    """Return the fewest of the first blocks of `order` without which `target` is met.

    Args:
        cost: of the network.
        target: what may remain.
        order: blocks, those to drop first at the front.
        hint: what the user can do if dropping all of them is not enough, for the message.

    Raises:
        TargetError: all of them are not enough.
    """
    limit, metric = cost.limit(target), target.counted_metric
    dense, branches = propagate(cost.structure, {}), blocks_of(cost.structure)
    for n in range(len(order) + 1):
        dropped = {name for block in order[:n] for name in branches[block]}
        amount = cost.cost_of(dense, dropped=dropped).of(metric)
        if amount <= limit:
            return list(order[:n])
    if not order:
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: "
            + (
                f"there are no candidates; {hint}"
                if branches
                else "no block of this network can be dropped; choose a method that removes units"
            )
        )
    raise TargetError(
        f"target.{target.metric}={target.keep} cannot be reached: dropping all "
        f"{len(order)} candidate blocks leaves {_shortfall(cost, target, amount)}; {hint}"
    )


def _shortfall(cost: Cost, target: Target, amount: int) -> str:
    """Return how far `amount`, the least that can remain, is above the target, in words."""
    total = cost.total(target.counted_metric)
    return (
        f"{amount:,} of {total:,} {target.unit} ({amount / total:.4f}), not {cost.limit(target):,}"
    )


def share_of(cost: Cost, block: str) -> float:
    """Return which share of the MACs is in `block`."""
    dense = propagate(cost.structure, {})
    without = cost.cost_of(dense, dropped=blocks_of(cost.structure)[block]).macs
    return 1 - without / cost.cost_of(dense).macs


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


def groups_of(described: Structure, blocks: Collection[str], group_size: int) -> list[Group]:
    """Return `blocks`, in network order, in groups of `group_size` successive ones of a stage.

    A stage is a sequence of blocks with one parent and one width of the stream. Groups are counted
    from its first block, whether or not that is among `blocks`: a pair in Swin has plain windows
    and then shifted ones. A group that is not complete in `blocks` is omitted.
    """
    branches = whole_blocks(described)

    def key(block: str) -> tuple[str, int, int]:
        stage, _, number = block.rpartition(".")
        width = stream_width(end_of(described, branches[block][1]))
        return stage, width, int(number) // group_size

    groups = [tuple(members) for _, members in groupby(blocks, key=key)]
    return [group for group in groups if len(group) == group_size]


def flatten(groups: Sequence[Group]) -> list[str]:
    """Return the blocks of all groups, in their order.

    >>> flatten([("a", "b"), ("c",)])
    ['a', 'b', 'c']
    """
    return [*chain.from_iterable(groups)]


def stream_width(end: Layer) -> int:
    """Return the dimensions of the stream that a branch with the last layer `end` adds to."""
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
            f"{end}: units are ranked by the layer that reads them, and this layer is in two "
            "factors: compress blocks before factorising layers"
        )
    return layer


def hidden_of(described: Structure, mlp: str) -> str:
    """Return the site of the units that the MLP branch `mlp` reads in its last layer."""
    (site,) = (part.site for part in end_of(described, mlp).inp if part.site is not None)
    return site
