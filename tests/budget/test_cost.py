"""The closed formula, against the counter and against one written by hand."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors import safe_open
from torch import nn

from nets import MODEL, PLANS, SIZE, TINY, plan_of, skeleton_net, small_net
from vitrim import Drop, Plan, count, cut, save
from vitrim.budget.blocks import fewest
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.files import WEIGHTS


@cache
def net() -> nn.Module:
    return small_net(dtype=torch.float32)


@cache
def cost() -> Cost:
    return Cost(net(), SIZE)


def formula(args: dict[str, Any], patch: int, kept: list[dict[str, int]]) -> tuple[int, int]:
    """Count params and MACs of a plain ViT by hand; `kept` holds the widths of each block."""
    dim, classes = args["embed_dim"], args["num_classes"]
    patches = (args["img_size"] // patch) ** 2
    tokens = patches + 1
    params = patch * patch * 3 * dim + dim  # the patch embedding
    params += dim + tokens * dim  # class token and positions
    params += 2 * dim + classes * (dim + 1)  # last norm and classifier
    macs = patches * patch * patch * 3 * dim + dim * classes
    for w in kept:
        rows = 2 * w["attn.qk"] + w["attn.v"]
        weights = rows * w["attn.input"] + w["attn.v"] * dim
        weights += w["mlp.hidden"] * (w["mlp.input"] + dim)
        params += weights + rows + dim + w["mlp.hidden"] + dim + 4 * dim
        macs += tokens * weights + tokens * tokens * (w["attn.qk"] + w["attn.v"])
    return params, macs


def widths(plan: Plan, block: int) -> dict[str, int]:
    """Return the widths that `plan` leaves in one block of `small_net()`."""
    keeps = {keep.site: set(keep.index) for keep in plan.keeps()}

    def kept(kind: str, size: int) -> set[int]:
        return keeps.get(f"blocks.{block}.{kind}", set(range(size)))

    v = {unit for unit in kept("attn.v", 24) if unit // 8 in kept("attn.heads", 3)}
    qk = {unit for unit in kept("attn.qk", 24) if unit // 8 in {value // 8 for value in v}}
    return {
        "attn.qk": len(qk),
        "attn.v": len(v),
        "attn.input": len(kept("attn.input", 24)),
        "mlp.input": len(kept("mlp.input", 24)),
        "mlp.hidden": len(kept("mlp.hidden", 48)),
    }


def test_the_hand_written_formula_gives_the_numbers_of_vit_base() -> None:
    args = {"embed_dim": 768, "num_classes": 1000, "img_size": 224}
    full = {kind: 768 for kind in ("attn.qk", "attn.v", "attn.input", "mlp.input")}
    by_hand = formula(args, 16, 12 * [{**full, "mlp.hidden": 3072}])
    assert by_hand == (86_567_656, 17_563_828_224)
    vit_base = skeleton_net("vit_base_patch16_224")
    amount = Cost(vit_base, 224).plan(plan_of({}))
    assert (amount.params, amount.macs) == by_hand
    assert count(vit_base, 224) == (*by_hand, 35_127_656_448)


def test_a_cut_vit_base_costs_what_the_formula_says() -> None:
    vit_base = skeleton_net("vit_base_patch16_224")
    kept = {
        "blocks.3.attn.heads": range(0, 12, 2),
        "blocks.3.attn.input": range(700),
        "blocks.11.mlp.hidden": range(0, 3072, 3),
    }
    full = {kind: 768 for kind in ("attn.qk", "attn.v", "attn.input", "mlp.input")}
    blocks = [{**full, "mlp.hidden": 3072} for _ in range(12)]
    blocks[3] |= {"attn.qk": 384, "attn.v": 384, "attn.input": 700}
    blocks[11] |= {"mlp.hidden": 1024}
    by_hand = formula({"embed_dim": 768, "num_classes": 1000, "img_size": 224}, 16, blocks)
    assert Cost(vit_base, 224).plan(plan_of(kept))[:2] == by_hand
    assert count(cut(vit_base, plan_of(kept)), 224)[:2] == by_hand


@given(PLANS)
def test_formula_and_counter_and_saved_file_agree(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    small = cut(net(), plan)
    amount = cost().plan(plan)
    assert (amount.params, amount.macs) == count(small, SIZE)[:2]
    assert (amount.params, amount.macs) == formula(TINY, 16, [widths(plan, 0), widths(plan, 1)])
    assert stored(save(tmp_path_factory.mktemp("net"), small, plan)) == amount.params


def stored(folder: Path) -> int:
    """Return how many numbers the weights file of `folder` holds."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def test_a_cut_network_has_a_formula_of_its_own() -> None:
    first = plan_of({"blocks.0.attn.qk": (0, 1, 9), "blocks.0.attn.input": (3, 5)})
    once = cut(net(), first)
    second = plan_of({"blocks.0.attn.heads": (1, 2), "blocks.0.attn.input": (1,)})
    assert Cost(once, SIZE).plan(second)[:2] == count(cut(once, second), SIZE)[:2]


def test_a_budget_in_blocks_is_what_remains_without_them() -> None:
    target = Target(metric="blocks", keep=1)
    without = Plan(model=MODEL, edits=(Drop(branch="blocks.0.attn"), Drop(branch="blocks.0.mlp")))
    assert cost().blocks()[0] == TINY["depth"]
    assert cost().limit(target) == cost().plan(without).macs == count(cut(net(), without), 32)[1]
    assert not target.is_identity
    half = cost().limit(Target(metric="blocks", keep=0.5))
    assert half == cost().dense_count.macs - math.ceil(0.5 * cost().blocks()[1] / 2)


def test_no_more_blocks_go_than_there_are() -> None:
    with pytest.raises(TargetError, match=r"target\.blocks=2: the network has 2 blocks"):
        cost().limit(Target(metric="blocks", keep=2))


@pytest.mark.parametrize("metric", ["blocks", "macs"])
def test_a_network_without_blocks_to_drop_says_so(metric: Any) -> None:
    swin = skeleton_net("swinv2_tiny_window8_256", depths=(1, 1, 1, 1), window_size=4, img_size=64)
    formula = Cost(swin, 64)
    with pytest.raises(
        TargetError, match=rf"target\.{metric}=0\.5.*no block of this network can be"
    ):
        fewest(formula, Target(metric=metric, keep=0.5), [], hint="protect fewer blocks")
