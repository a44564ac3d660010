"""From a target to hidden widths: exactly, or as DC-ViT's paper and code count MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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


class Shape(NamedTuple):
    """What compressed blocks become.

    `widths` has the hidden width of each block whose MLP stays, `removed` the blocks that lose
    their attention; a block there that has no width is removed altogether.
    """

    widths: dict[str, int]
    removed: list[str]

    @property
    def blocks(self) -> list[str]:
        """The compressed blocks, in the order in which they were chosen."""
        return [*dict.fromkeys([*self.widths, *self.removed])]

    def of(self, group: Group) -> Shape:
        """Return what the blocks of one candidate become."""
        widths = {block: width for block, width in self.widths.items() if block in group}
        return Shape(widths, [block for block in self.removed if block in group])


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The rule by which a target says how many candidates are compressed, and how far.

    Args:
        accounting: exact, or the paper's count of MACs.
        extra_blocks: candidates beyond the fewest that meet the target.
        drop_mlps: whether compressed blocks are removed altogether.
    """

    accounting: Accounting
    extra_blocks: int
    drop_mlps: bool

    def shape(self, cost: Cost, target: Target, order: Sequence[Group]) -> Shape:
        """Return what becomes of the first candidates of `order`, as many as the target needs.

        Args:
            cost: of the network.
            target: what may remain.
            order: the candidates, those to compress first at the front.

        Raises:
            TargetError: the candidates, all of them compressed, are above the target.
        """
        if not whole_blocks(cost.structure):
            return Shape({}, fewest(cost, target, flatten(order), hint=_HINT))
        if self.drop_mlps:
            return Shape({}, _whole_groups(cost, target, order, self.accounting))
        if self.accounting == "paper":
            widths = paper_widths(cost, target, order, extra_blocks=self.extra_blocks)
            return Shape(widths, list(widths))
        n = fewest_groups(cost, target, order, hint=_HINT)
        n = _with_extra(n, self.extra_blocks, order)
        return Shape(*dense_widths(cost, target, order[:n]))

    def shapes_of_trials(
        self, cost: Cost, target: Target, candidates: Sequence[Group]
    ) -> dict[str, Shape]:
        """Return, by the first block of each candidate, its shape if it is compressed first."""
        return {
            group[0]: self.shape(
                cost, target, [group, *(other for other in candidates if other != group)]
            ).of(group)
            for group in candidates
        }


def _with_extra(n: int, extra_blocks: int, order: Sequence[Group]) -> int:
    """Return `n + extra_blocks` candidates.

    Raises:
        TargetError: these are more than there are.
    """
    if n + extra_blocks > len(order):
        raise TargetError(
            f"method.extra_blocks={extra_blocks}: {len(flatten(order[:n]))} blocks and these are "
            f"more than the {len(order)} candidates ({len(flatten(order))} blocks); set fewer"
        )
    return n + extra_blocks


def _whole_groups(
    cost: Cost, target: Target, order: Sequence[Group], accounting: Accounting
) -> list[str]:
    """Return the blocks of the fewest first groups of `order` whose removal meets the target.

    A target in blocks says how many blocks are removed, whatever the MACs of each are.

    Raises:
        TargetError: all of them are not enough.
    """
    blocks = flatten(order)
    each = dict.fromkeys(blocks, 1)
    if target.metric == "blocks":
        needed = float(target.keep)
    elif accounting == "paper":
        macs = paper_macs(cost)
        needed = _removed(macs, target)
        each = {block: sum(macs.blocks[block]) + _norm_macs(cost, block) for block in blocks}
    else:
        needed = len(fewest(cost, target, blocks, hint=_HINT))
    total = 0
    for n, group in enumerate(order, start=1):
        total += sum(each[block] for block in group)
        if total >= needed:
            return flatten(order[:n])
    raise TargetError(
        f"target.{target.metric}={target.keep} cannot be reached: all {len(order)} candidates "
        f"({len(blocks)} blocks) removed are not enough; {_HINT}"
    )


def paper_widths(
    cost: Cost, target: Target, order: Sequence[Group], *, extra_blocks: int = 0
) -> dict[str, int]:
    """Return hidden widths by block as the paper's code finds them, its rounding included.

    It counts Linears and convolutions without the products of attention, and a LayerNorm as four
    MACs a number. Eqs. 1 and 2 in binary floating point give ViT-B 2304, 1535, 1151 and 920 units
    in 2 to 5 blocks for the MACs of 1 to 4 blocks. Where blocks differ, as those of Swin's stages
    do, the equations use the mean of the chosen groups, whose blocks all keep the same share.

    With `extra_blocks` candidates beyond the k of eq. 1, eq. 2 has k + extra_blocks in place of k:
    as many MACs remain, of more and wider blocks.

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
    n = _with_extra(n, extra_blocks, order)
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
        norms.append(_norm_macs(cost, block))
        in_attention, in_mlp = (
            total - cost.cost_of(dense, dropped={branch}).macs for branch in (attention, mlp)
        )
        blocks[block] = BlockMACs(in_attention - products[attention] + norms[-1], in_mlp)
    mean = (sum(map(sum, blocks.values())) + sum(norms)) // len(blocks)
    # two norms in each block, and one after the last
    return PaperMACs(total - sum(products.values()) + 2 * sum(norms) + norms[-1], mean, blocks)


def _norm_macs(cost: Cost, block: str) -> int:
    """Return the MACs that the paper counts for one norm of a block."""
    end = _end(cost, block)
    return NORM_MACS * cost.positions(end.name) * stream_width(end)


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
