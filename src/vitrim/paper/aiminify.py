"""The FLOPs of AIminify's blog, where its count is not the true one.

Its ViT-B and DeiT-B rows are true FLOPs. Its DINOv2 rows count the attention of the hub's xformers
kernel with tokens and heads exchanged: 4 N H^2 d per block instead of 4 N^2 H d, for N tokens and H
heads of d dims. This misses 82.4 of 173.5 GFLOPs at 644 pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitrim.budget.cost import Cost
    from vitrim.plan import Plan

XFORMERS = ("dinov2_vits14_lc",)
"""Networks whose attention the blog ran with xformers."""


def flops_blog(name: str, cost: Cost, plan: Plan) -> int | None:
    """Return the FLOPs that the blog would print for a plan; None where they are the true ones.

    Dense `dinov2_vits14_lc` at 644 pixels: 91,096,848,384.
    """
    if name not in XFORMERS:
        return None
    return 2 * cost.plan(plan).macs - 2 * sum(
        tokens * (context - heads) * dims for tokens, context, heads, dims in cost.attended(plan)
    )
