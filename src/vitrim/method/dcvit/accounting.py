"""From a target to hidden widths: exactly, or as DC-ViT's paper and code count MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from vitrim.budget.blocks import (
    Group,
    dense_widths,
    end_of,
    fewest,
    fewest_groups,
    flatten,
    hidden_of,
    stream_width,
    whole_blocks,
)
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.network.structure import Layer
from vitrim.network.survivors import propagate
from vitrim.plan import Plan

Accounting = Literal["exact", "paper"]
_HINT = "protect fewer blocks (method.protected)"
NORM_MACS = 4
"""MACs that the paper counts for each number that a LayerNorm reads."""


class BlockMACs(NamedTuple):
    """The parts of a block: its attention with the norm before it, and its MLP without the norm."""

    attention: int
    mlp: int


class PaperMACs(NamedTuple):
    """MACs by the paper's count: of the network, of a block of mean size, and by block."""

    total: int
    mean_block: int
    blocks: dict[str, BlockMACs]


def compressed_widths(
    cost: Cost,
    target: Target,
    order: Sequence[Group],
    *,
    accounting: Accounting,
    extra_blocks: int,
) -> tuple[dict[str, int], list[str]]:
    """Return the hidden width of each compressed block, and those that lose their attention.

    Where blocks are dropped whole, there are no widths, and these are the dropped blocks.

    Args:
        cost: of the network.
        target: what may remain.
        order: the candidates, those to compress first at the front.
        accounting: exact, or the paper's count of MACs.
        extra_blocks: candidates beyond the fewest that meet the target.

    Raises:
        TargetError: the candidates, all of them compressed, are above the target.
    """
    if not whole_blocks(cost.structure):
        return {}, fewest(cost, target, flatten(order), hint=_HINT)
    if accounting == "paper":
        widths = paper_widths(cost, target, order)
        return widths, list(widths)
    n = fewest_groups(cost, target, order, hint=_HINT)
    if n + extra_blocks > len(order):
        raise TargetError(
            f"method.extra_blocks={extra_blocks}: {len(flatten(order[:n]))} blocks and these are "
            f"more than the {len(order)} candidates ({len(flatten(order))} blocks); set fewer"
        )
    return dense_widths(cost, target, order[: n + extra_blocks])


def paper_widths(cost: Cost, target: Target, order: Sequence[Group]) -> dict[str, int]:
    """Return hidden widths by block as the paper's code finds them, its rounding included.

    It counts Linears and convolutions without the products of attention, and a LayerNorm as four
    MACs a number. Eqs. 1 and 2 in binary floating point give ViT-B 2304, 1535, 1151 and 920 units
    in 2 to 5 blocks for the MACs of 1 to 4 blocks. Where blocks differ, as those of Swin's stages
    do, the equations use the mean of the chosen groups, whose blocks all keep the same share.

    Raises:
        TargetError: the target needs more blocks than there are candidates.
    """
    macs = paper_macs(cost)
    removed = _removed(macs, target)

    def needed(n: int) -> int:
        """Return how many groups it takes, if they have the mean size of the first n: eq. 1."""
        return math.ceil(removed / (sum(sum(macs.blocks[b]) for b in flatten(order[:n])) / n))

    n = next((n for n in range(1, len(order) + 1) if needed(n) <= n), None)
    if n is None:
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: it takes "
            f"{needed(len(order)) * len(order[0])} blocks, and there are {len(order)} candidates "
            f"({len(flatten(order))} blocks); {_HINT}"
        )
    chosen = flatten(order[:n])
    attentions = sum(macs.blocks[block].attention for block in chosen)
    mlps = sum(macs.blocks[block].mlp for block in chosen)
    share = 1 - ((removed - attentions) / n) / (mlps / n)
    return {block: _width(cost, target, block, share, len(chosen)) for block in chosen}


def _removed(macs: PaperMACs, target: Target) -> float:
    """Return how many MACs have to be removed."""
    total = macs.total
    if target.metric == "blocks":
        ratio = (total - target.keep * macs.mean_block) / total
    else:
        ratio = float(target.keep)
    if ratio > 1:
        ratio = ratio / total
    return total * (1 - ratio)


def _width(cost: Cost, target: Target, block: str, share: float, n_blocks: int) -> int:
    """Return how many hidden units of `block` the share is: eq. 2, rounded as the paper's code.

    Raises:
        TargetError: none, or more than there are.
    """
    end = _end(cost, block)
    mlp = whole_blocks(cost.structure)[block][1]
    size = cost.structure.sites[hidden_of(cost.structure, mlp)].size
    dim = stream_width(end)
    width = int(dim * (share * (size / dim)))
    if not 1 <= width <= size:
        raise TargetError(
            f"target.{target.metric}={target.keep}: eqs. 1 and 2 give {width} of {size} hidden "
            f"units in {block}, one of {n_blocks} blocks; choose another target or "
            "method.accounting=exact"
        )
    return width


def paper_macs(cost: Cost) -> PaperMACs:
    """Return MACs as the paper counts them; without the norms between Swin's stages."""
    described, dense = cost.structure, propagate(cost.structure, {})
    total = cost.cost_of(dense).macs
    products = _products(cost)
    blocks, norms = {}, []
    for block, (attention, mlp) in whole_blocks(described).items():
        end = _end(cost, block)
        norm = NORM_MACS * cost.positions(end.name) * stream_width(end)
        norms.append(norm)
        in_attention, in_mlp = (
            total - cost.cost_of(dense, dropped={branch}).macs for branch in (attention, mlp)
        )
        blocks[block] = BlockMACs(in_attention - products[attention] + norm, in_mlp)
    mean = (sum(map(sum, blocks.values())) + sum(norms)) // len(blocks)
    # two norms in each block, and one after the last
    return PaperMACs(total - sum(products.values()) + 2 * sum(norms) + norms[-1], mean, blocks)


def _products(cost: Cost) -> dict[str, int]:
    """Return the MACs of the products of queries, keys and values, by attention."""
    attended = cost.attended(Plan(model={}, edits=()))
    return {
        attention.branch: tokens * context * dims
        for attention, (tokens, context, _, dims) in zip(
            cost.structure.attentions, attended, strict=True
        )
    }


def _end(cost: Cost, block: str) -> Layer:
    """Return the last layer of a block's MLP."""
    return end_of(cost.structure, whole_blocks(cost.structure)[block][1])
