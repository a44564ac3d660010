"""Fifty budgets and what dense compression makes of them: `python -m tests.dense [timm name]`."""

from __future__ import annotations

import argparse

import timm

from vitrim.budget.blocks import dense_widths, fewest_groups
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.network.skeleton import on_meta
from vitrim.network.structure import blocks_of
from vitrim.plan import Drop, Keep, Plan


def main() -> None:
    """Print, by share of the MACs, the blocks, the hidden units and how far below they end."""
    parser = argparse.ArgumentParser(prog="python -m tests.dense", description=__doc__)
    parser.add_argument("name", nargs="?", default="vit_base_patch16_224")
    with on_meta():
        net = timm.create_model(parser.parse_args().name)
    cost = Cost(net, 224)
    whole = cost.plan(Plan(model={}, edits=())).macs
    order = [(block,) for block in [*blocks_of(cost.structure)][1:-1]]
    print("asked MACs       reached MACs     below  blocks  units left in each")
    for step in range(50):
        target = Target(metric="macs", keep=round(0.995 - 0.0115 * step, 4))
        n = fewest_groups(cost, target, order, hint="protect fewer blocks")
        widths, dropped = dense_widths(cost, target, order[:n])
        keeps = [
            Keep(site=site, index=tuple(range(width)))
            for block, width in widths.items()
            if width < cost.structure.sites[site := f"{block}.mlp.hidden"].size
        ]
        drops = [Drop(branch=f"{block}.attn") for block in dropped]
        reached = cost.plan(Plan(model={}, edits=(*drops, *keeps))).macs
        allowed = cost.limit(target)
        units = " ".join(map(str, widths.values()))
        print(
            f"{target.keep:6.2%} {allowed:15,.0f}  {reached / whole:6.2%} {reached:15,}  "
            f"{allowed - reached:9,.0f}  {len(dropped):2}  {units}"
        )


if __name__ == "__main__":
    main()
