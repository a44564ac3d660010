"""Blocks that dense compression shrinks, and how far a budget makes it shrink them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from vitrim.errors import ConfigError
from vitrim.model.site import Layer, Structure, settle
from vitrim.plan import Plan
from vitrim.target import Cost, Target, TargetError


def dense_widths(
    cost: Cost,
    target: Target,
    order: Sequence[str],
    blocks: Mapping[str, tuple[str, str]],
    *,
    extra: int = 0,
) -> tuple[dict[str, int], list[str]]:
    """Return hidden widths by block and the blocks without attention: the largest within `target`.

    The fewest blocks of `order` that can meet it, and `extra` more, keep the same share of their
    units, or one unit more. So little may have to go that an attention would be too much: then the
    blocks at the end of them keep theirs.

    Raises:
        TargetError: not even all blocks of `order` with one unit each are within `target`.
    """
    described, limit = cost.structure, cost.allowed(target)
    sites = {block: hidden_of(described, mlp) for block, (_, mlp) in blocks.items()}
    sizes = {block: described.sites[site].size for block, site in sites.items()}

    def left(widths: Mapping[str, int], attended: Sequence[str]) -> int:
        kept = {sites[block]: torch.arange(width) for block, width in widths.items()}
        dropped = {blocks[block][0] for block in widths if block not in attended}
        amount = cost.of(settle(described, kept), (), None, dropped)
        return int(getattr(amount, target.unit))

    enough = next(
        (n for n in range(1, len(order) + 1) if left(dict.fromkeys(order[:n], 1), ()) <= limit),
        None,
    )
    if enough is None:
        lowest = left(dict.fromkeys(order, 1), ())
        whole = cost.whole(target.unit)
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: compressing all "
            f"{len(order)} candidate blocks leaves {lowest:,} of {whole:,} {target.unit} "
            f"({lowest / whole:.4f}), not {limit:,}; spare fewer blocks (method.spare)"
        )
    n = enough + extra
    if n > len(order):
        raise TargetError(
            f"method.extra={extra}: {enough} blocks and these are more than the {len(order)} "
            "candidates; set fewer"
        )
    chosen = order[:n]
    units = sorted(
        ((place + 1) / sizes[block], at, block)
        for at, block in enumerate(chosen)
        for place in range(1, sizes[block])
    )
    ones, full = dict.fromkeys(chosen, 1), {block: sizes[block] for block in chosen}
    attended = next(  # as many attentions go as still leave units to take
        (
            chosen[at:]
            for at in range(n, -1, -1)
            if left(ones, chosen[at:]) <= limit <= left(full, chosen[at:])
        ),
        None,
    )
    if attended is None:
        raise TargetError(
            f"target.{target.metric}={target.keep} lies between what {n} blocks with and without "
            "an attention leave; set another target or method.extra"
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


def _counted(chosen: Sequence[str], units: Sequence[tuple[float, int, str]]) -> dict[str, int]:
    """Return how many units each block has, the first one that all have included."""
    widths = dict.fromkeys(chosen, 1)
    for _, _, block in units:
        widths[block] += 1
    return widths


def paper_widths(
    cost: Cost, target: Target, order: Sequence[str], blocks: Mapping[str, tuple[str, str]]
) -> dict[str, int]:
    """Return hidden widths by block as the paper's code finds them, its rounding included.

    It counts Linears and convolutions without the products of attention, and a LayerNorm as four
    MACs a number; eqs. 1 and 2 in binary floating point give ViT-B 2304, 1535, 1151 and 920 units
    in 2 to 5 blocks for the MACs of 1 to 4 blocks.

    Raises:
        TargetError: the budget needs more blocks than there are candidates.
    """
    whole, attention, mlp, block = paper_macs(cost, blocks)
    ratio = (
        (whole - target.keep * block) / whole if target.metric == "blocks" else float(target.keep)
    )
    if ratio > 1:
        ratio = ratio / whole
    gone = whole * (1 - ratio)
    n = math.ceil(gone / (attention + mlp))
    if n > len(order):
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: it takes {n} blocks, and "
            f"there are {len(order)} candidates; spare fewer blocks (method.spare)"
        )
    mlp_branch = blocks[order[0]][1]
    first = cost.structure.sites[hidden_of(cost.structure, mlp_branch)].size
    share = 1 - ((gone - n * attention) / n) / mlp
    dim = _dim(cost, mlp_branch)
    width = int(dim * (share * (first / dim)))
    if not 1 <= width <= first:
        raise TargetError(
            f"target.{target.metric}={target.keep}: eqs. 1 and 2 give {width} hidden units in "
            f"each of {n} blocks, of {first}; choose another budget or method.accounting=exact"
        )
    return dict.fromkeys(order[:n], width)


def paper_macs(cost: Cost, blocks: Mapping[str, tuple[str, str]]) -> tuple[int, int, int, int]:
    """Return MACs as the paper counts them: network, attention with its norm, MLP, block."""
    attended = [*cost.attended(Plan(model={}, edits=()))]
    tokens, context, _, dims = attended[0]
    attention, mlp = next(iter(blocks.values()))
    dense = settle(cost.structure, {})
    macs = cost.of(dense).macs
    norm = 4 * tokens * _dim(cost, mlp)
    products = tokens * context * dims
    no_attention, no_mlp = (macs - cost.of(dense, dropped={name}).macs for name in (attention, mlp))
    linear = no_attention - products
    whole = macs - sum(t * c * d for t, c, _, d in attended) + norm * (2 * len(attended) + 1)
    return whole, linear + norm, no_mlp, linear + norm + no_mlp + norm


def _dim(cost: Cost, mlp: str) -> int:
    """Return how many numbers a token has in the stream that an MLP adds to."""
    return sum(part.size for part in end_of(cost.structure, mlp).out)


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
