"""FLOPs as the papers count them: what they printed of dense and of compact networks."""

from __future__ import annotations

import pytest

from nets import skeleton_net
from vitrim import Drop, Keep, Plan
from vitrim.budget.cost import Cost
from vitrim.method.dcvit.accounting import paper_macs
from vitrim.paper import published
from vitrim.paper.counts import COUNTS, macs_dcvit, paper_flops
from vitrim.report.compare import difference

NAME = "vit_base_patch16_224"


@pytest.fixture(scope="module")
def cost() -> Cost:
    return Cost(skeleton_net(NAME), 224)


def compressed(n_blocks: int, hidden: int) -> Plan:
    """Return a plan of dense compression: no attention and fewer hidden units in some blocks."""
    blocks = [f"blocks.{i}" for i in range(1, n_blocks + 1)]
    keeps = [Keep(site=f"{block}.mlp.hidden", index=tuple(range(hidden))) for block in blocks]
    drops = [Drop(branch=f"{block}.attn") for block in blocks]
    return Plan(model={"name": NAME, "args": {}}, edits=(*keeps, *drops))


def test_the_dense_network_of_dcvit(cost: Cost) -> None:
    dense = Plan(model={}, edits=())
    assert macs_dcvit(cost, dense) == 16_863_630_336 == paper_macs(cost).total
    flops = paper_flops(NAME, cost, dense)
    assert flops.keys() == set(COUNTS.values())
    assert flops["aiminify"] == flops["vtp"] == flops["mixed_rank"] == 35_127_656_448


@pytest.mark.parametrize(("n", "hidden"), [(1, 2304), (2, 1535), (3, 1151), (4, 920)])
def test_compact_networks_of_dcvit_have_the_published_macs(cost: Cost, n: int, hidden: int) -> None:
    overrides = f"model=vit_base target.blocks={n}"
    rows = [row for row in published() if row.table == "Table 3, structure"]
    (row,) = (row for row in rows if row.overrides == overrides)
    flops = paper_flops(NAME, cost, compressed(n + 1, hidden))
    assert row.flops_step == 2e6
    delta = difference(flops["dcvit"], row.flops, row.flops_step)
    assert delta == (-1_561_728 if n == 2 else 0)  # 1535.86 units, and the paper's code floors
    assert flops["vtp"] - flops["dcvit"] > 8e8


def test_whole_blocks_without_their_norms(cost: Cost) -> None:
    dropped = Plan(model={}, edits=(Drop(branch="blocks.3.attn"), Drop(branch="blocks.3.mlp")))
    counted = macs_dcvit(cost, dropped)
    assert counted is not None
    assert f"{counted / 16_863_630_336 - 1:.4f}" == "-0.0828"
