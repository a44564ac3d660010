"""Which groups of blocks dense compression may compress."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from vitrim.budget.blocks import (
    Group,
    flatten,
    groups_of,
    lone_blocks,
    share_of,
    whole_blocks,
)
from vitrim.budget.cost import Cost
from vitrim.errors import ConfigError
from vitrim.network.structure import Structure, blocks_of

_log = logging.getLogger(__name__)


def candidates_of(
    described: Structure, *, protected: Sequence[int], group_size: int
) -> list[Group]:
    """Return the groups of blocks that may be compressed, in network order.

    Where no block has an attention, each block is a group.

    Args:
        described: the network.
        protected: how many first and how many last blocks are not compressed.
        group_size: successive blocks of a stage in each group.
    """
    first, last = protected
    order = [*blocks_of(described)]
    inner = set(order[first : len(order) - last])
    blocks = [block for block in whole_blocks(described) if block in inner]
    if not blocks:
        return [(block,) for block in lone_blocks(described) if block in inner]
    return groups_of(described, blocks, group_size)


def no_candidates(protected: Sequence[int], group_size: int) -> ConfigError:
    """Return the error of a network without candidates."""
    return ConfigError(
        f"method.group_size={group_size}, method.protected={list(protected)}: no stage has "
        f"{group_size} successive blocks that are not protected; lower either of them"
    )


def allowed_of(candidates: Sequence[Group], allowed_blocks: Collection[str] | None) -> list[Group]:
    """Return the candidates with an allowed block; None allows all of them.

    Raises:
        ConfigError: an allowed block is in none of the candidates.
    """
    if allowed_blocks is None:
        return list(candidates)
    known = flatten(candidates)
    unknown = sorted(set(allowed_blocks) - set(known))
    if unknown:
        raise ConfigError(
            f"method.allowed_blocks: {', '.join(unknown[:3])}: expected some of {', '.join(known)}"
        )
    allowed = set(allowed_blocks)
    return [group for group in candidates if not allowed.isdisjoint(group)]


def ranked_by_cost(
    cost: Cost, candidates: Sequence[Group], scores: Mapping[str, float]
) -> list[Group]:
    """Return the candidates, those to compress first at the front.

    Groups of attentions and MLPs are ranked by their scores, blocks that are dropped whole by their
    scores relative to their share of the MACs. Ties, and all candidates if there are no scores,
    stay in network order.

    Args:
        cost: of the network.
        candidates: in network order.
        scores: by the first block of each candidate.
    """
    if not scores:
        _log.info("no images to score blocks with: blocks are taken in network order")
        return list(candidates)
    if whole_blocks(cost.structure):
        return sorted(candidates, key=lambda group: scores[group[0]])
    relative = {group: scores[group[0]] / share_of(cost, group[0]) for group in candidates}
    return sorted(candidates, key=lambda group: relative[group])


def check_lone_blocks(described: Structure, **settings: tuple[object, object]) -> None:
    """Refuse what has no meaning in a network whose blocks are dropped whole.

    Args:
        described: the network.
        settings: by key of the method its value, and the only one that fits.

    Raises:
        ConfigError: there are no such blocks either, or a setting does not fit.
    """
    if whole_blocks(described):
        return
    if not lone_blocks(described):
        raise ConfigError(
            "the network has no blocks of an attention and an MLP to compress, nor any that could "
            "be dropped as a whole; choose a method that cuts channels"
        )
    for key, (value, required) in settings.items():
        if value != required:
            raise ConfigError(
                f"method.{key}={value}: this network has no attentions, and its blocks are dropped "
                f"whole, one after the other; set method.{key}={required}"
            )
