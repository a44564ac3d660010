"""FLOPs of a network as each of the papers counts them; each is compared with its own count.

| key | paper | what it counts |
|---|---|---|
| `aiminify` | AIminify's blog | the true FLOPs, DINOv2 apart (`vitrim.paper.aiminify`) |
| `dcvit` | DC-ViT, by thop | no products of attention, no biases, a LayerNorm as 4 MACs a number |
| `mixed_rank` | mixed rank | params; FLOPs are the true ones |
| `vtp` | VTP | the true FLOPs (its DeiT-B has 17.6 G MACs) |

True FLOPs are twice the MACs of convolutions, Linears and the products of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vitrim.paper.aiminify import flops_blog

if TYPE_CHECKING:
    from vitrim.budget.cost import Cost
    from vitrim.plan import Plan

COUNTS: Mapping[str, str] = {
    "AIminify blog": "aiminify",
    "DC-ViT": "dcvit",
    "Mixed-rank (2402.06004)": "mixed_rank",
    "VTP": "vtp",
}
"""Key of the count by the paper's name in published.csv."""
NORM_MACS = 4
"""MACs that thop counts for each number that a LayerNorm reads."""


def paper_flops(name: str, cost: Cost, plan: Plan) -> dict[str, int]:
    """Return the FLOPs of what `plan` leaves of network `name`, by the key of the count.

    `dcvit` is missing for networks without blocks of one attention and one MLP.
    """
    true = 2 * cost.plan(plan).macs
    blog, dcvit = flops_blog(name, cost, plan), macs_dcvit(cost, plan)
    counts = {"aiminify": true if blog is None else blog, "mixed_rank": true, "vtp": true}
    return counts if dcvit is None else {**counts, "dcvit": 2 * dcvit}


def macs_dcvit(cost: Cost, plan: Plan) -> int | None:
    """Return the MACs as DC-ViT's code counts them; None for networks without such blocks.

    The norms are those before each branch that is kept and the one after the last block; norms
    between the stages of Swin are not counted. Dense ViT-B/16 at 224 pixels: 16,863,630,336.
    """
    from vitrim.budget.blocks import end_of, stream_width, whole_blocks
    from vitrim.network.survivors import dropped_of

    blocks = whole_blocks(cost.structure)
    if not blocks:
        return None
    dropped = dropped_of(cost.structure, plan)
    products = sum(tokens * context * dims for tokens, context, _, dims in cost.attended(plan))
    norms, norm = 0, 0
    for attention, mlp in blocks.values():
        end = end_of(cost.structure, mlp)
        norm = NORM_MACS * cost.positions(end.name) * stream_width(end)
        norms += norm * sum(branch not in dropped for branch in (attention, mlp))
    return cost.plan(plan).macs - products + norms + norm
