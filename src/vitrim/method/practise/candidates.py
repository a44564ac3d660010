"""Which groups of blocks PRACTISE may drop, and how many of them a target needs."""

from __future__ import annotations

from collections.abc import Sequence

from vitrim.budget.blocks import (
    Group,
    fewest,
    flatten,
    groups_of,
    lone_blocks,
    share_of,
    whole_blocks,
)
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.errors import ConfigError
from vitrim.network.structure import Structure, blocks_of

_HINT = "protect fewer blocks (method.protected)"


def candidates_of(
    described: Structure, *, protected: Sequence[int] | None, group_size: int
) -> list[Group]:
    """Return the groups of blocks that may be dropped, in network order.

    Args:
        described: the network.
        protected: how many first and how many last blocks are never dropped. None: the first and
            the last block of a transformer, and the first block of every stage of a convolutional
            network, as in the paper.
        group_size: successive blocks of a stage in each group.

    Raises:
        ConfigError: blocks that are not attention and MLP are to be dropped in groups.
    """
    blocks = [*blocks_of(described)]
    lone = set(lone_blocks(described))
    if protected is None and lone:
        blocks = [block for block in blocks if block.rpartition(".")[2] != "0"]
    else:
        first, last = (1, 1) if protected is None else protected
        blocks = blocks[first : len(blocks) - last]
    if group_size == 1:
        return [(block,) for block in blocks]
    if lone:
        raise ConfigError(
            f"method.group_size={group_size}: this network has no attentions, and its blocks are "
            "dropped one after the other; set method.group_size=1"
        )
    whole = whole_blocks(described)
    return groups_of(described, [block for block in blocks if block in whole], group_size)


def fewest_groups(cost: Cost, target: Target, order: Sequence[Group]) -> list[Group]:
    """Return the fewest of the first groups of `order` without which `target` is met.

    Raises:
        TargetError: all of them are not enough.
    """
    n_blocks = len(fewest(cost, target, flatten(order), hint=_HINT))
    sizes = [len(flatten(order[:n])) for n in range(len(order) + 1)]
    return list(order[: next(n for n, size in enumerate(sizes) if size >= n_blocks)])


def share_of_group(cost: Cost, group: Group) -> float:
    """Return which share of the MACs is in the blocks of `group`."""
    return sum(share_of(cost, block) for block in group)
