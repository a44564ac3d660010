"""MACs and widths as DC-ViT's paper and code count them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vitrim.budget.blocks import Group, _flat, _rows, end_of, hidden_of, whole_blocks
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.network.survivors import settle
from vitrim.plan import Plan


def paper_widths(cost: Cost, target: Target, order: Sequence[Group]) -> dict[str, int]:
    """Return hidden widths by block as the paper's code finds them, its rounding included.

    It counts Linears and convolutions without the products of attention, and a LayerNorm as four
    MACs a number; eqs. 1 and 2 in binary floating point give ViT-B 2304, 1535, 1151 and 920 units
    in 2 to 5 blocks for the MACs of 1 to 4 blocks. Where blocks differ, as those of Swin's stages
    do, the equations have the mean of the chosen groups, whose blocks all keep the same share.

    Raises:
        TargetError: the budget needs more blocks than there are candidates.
    """
    whole, block, held = paper_macs(cost)
    ratio = (
        (whole - target.keep * block) / whole if target.metric == "blocks" else float(target.keep)
    )
    if ratio > 1:
        ratio = ratio / whole
    gone = whole * (1 - ratio)

    def needed(n: int) -> int:
        """Return how many groups of the mean size of the first n it takes: eq. 1."""
        return math.ceil(gone / (sum(sum(held[name]) for name in _flat(order[:n])) / n))

    n = next((n for n in range(1, len(order) + 1) if needed(n) <= n), None)
    if n is None:
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: it takes "
            f"{needed(len(order)) * len(order[0])} blocks, and there are {len(order)} candidates "
            f"({len(_flat(order))} blocks); spare fewer blocks (method.spare)"
        )
    chosen = _flat(order[:n])
    attentions, mlps = (sum(held[name][part] for name in chosen) for part in (0, 1))
    share = 1 - ((gone - attentions) / n) / (mlps / n)
    widths, branches = {}, whole_blocks(cost.structure)
    for name in chosen:
        end = end_of(cost.structure, branches[name][1])
        dim = _rows(end)
        first = cost.structure.sites[hidden_of(cost.structure, branches[name][1])].size
        widths[name] = int(dim * (share * (first / dim)))
        if not 1 <= widths[name] <= first:
            raise TargetError(
                f"target.{target.metric}={target.keep}: eqs. 1 and 2 give {widths[name]} of "
                f"{first} hidden units in {name}, of {len(chosen)} blocks; choose another budget "
                "or method.accounting=exact"
            )
    return widths


def paper_macs(cost: Cost) -> tuple[int, int, dict[str, tuple[int, int]]]:
    """Return MACs as the paper counts them: network, block of mean size, the parts of each block.

    Those are its attention with the norm before it, and its MLP without. The norms between Swin's
    stages are left out.
    """
    described, dense = cost.structure, settle(cost.structure, {})
    macs = cost.of(dense).macs
    attended = cost.attended(Plan(model={}, edits=()))
    products = {
        attention.branch: tokens * context * dims
        for attention, (tokens, context, _, dims) in zip(
            described.attentions, attended, strict=True
        )
    }
    held, norms = {}, []
    for block, (attention, mlp) in whole_blocks(described).items():
        end = end_of(described, mlp)
        norms.append(4 * cost.positions(end.name) * _rows(end))
        no_attention, no_mlp = (
            macs - cost.of(dense, dropped={name}).macs for name in (attention, mlp)
        )
        held[block] = no_attention - products[attention] + norms[-1], no_mlp
    whole = macs - sum(products.values()) + 2 * sum(norms) + norms[-1]
    return whole, (sum(map(sum, held.values())) + sum(norms)) // len(held), held
