"""Low-rank layers in plans: cutting, masking, counting, saving, combining."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nets import MODEL, PLANS, images, outputs, plan_of, relative_error, small_net
from vitrim import Keep, LowRank, Plan, combine, count, cut, load, masked, save
from vitrim.budget.cost import Cost
from vitrim.network import structure
from vitrim.network.factored import LowRankLinear, SplitLinear
from vitrim.plan import PlanError, dumps, loads

HIGHEST = {"qkv": 24, "qkv.q": 24, "qkv.k": 24, "qkv.v": 24, "proj": 24, "fc1": 24, "fc2": 24}
PIECES = ("qkv.q", "qkv.k", "qkv.v")


def path(block: int, layer: str) -> str:
    part = "mlp" if layer.startswith("fc") else "attn"
    return f"blocks.{block}.{part}.{layer}"


def low_rank(ranks: Mapping[str, int], first: Plan | None = None) -> Plan:
    edits = tuple(LowRank(linear=name, rank=rank) for name, rank in ranks.items())
    return Plan(model=MODEL, edits=(*(first.edits if first else ()), *edits))


@st.composite
def ranks(draw: st.DrawFn) -> dict[str, int]:
    """Draw ranks for any of the layers, qkv as one layer or any of its pieces."""
    chosen = {}
    for block in (0, 1):
        fused = draw(st.booleans())
        for layer, most in HIGHEST.items():
            fits = not layer.startswith("qkv") or (layer in PIECES) != fused
            if fits and draw(st.booleans()):
                chosen[path(block, layer)] = draw(st.integers(1, most))
    return chosen


@given(first=PLANS, chosen=ranks())
def test_cut_equals_masked_and_counts_what_the_formula_says(
    first: Plan, chosen: dict[str, int]
) -> None:
    plan, net, x = low_rank(chosen, first), small_net(), images()
    compact = cut(net, plan)
    assert relative_error(outputs(compact, x), outputs(masked(net, plan), x)) <= 1e-12
    assert Cost(net, 32).plan(plan)[:2] == count(compact, 32)[:2]
    assert Cost(compact, 32).plan(Plan(model=MODEL, edits=()))[:2] == count(compact, 32)[:2]
    assert loads(dumps(plan)) == plan


@given(chosen=ranks())
def test_full_rank_computes_what_the_dense_network_does(chosen: dict[str, int]) -> None:
    plan = low_rank({name: HIGHEST[name.split(".", 3)[3]] for name in chosen})
    net, x = small_net(), images()
    assert relative_error(outputs(cut(net, plan), x), outputs(net, x)) <= 1e-12
    single = small_net(dtype=torch.float32)
    actual = outputs(cut(single, plan), x.float())
    assert relative_error(actual, outputs(single, x.float())) <= 1e-5


@given(chosen=ranks(), second=PLANS)
def test_a_low_rank_network_can_be_sliced(chosen: dict[str, int], second: Plan) -> None:
    net, x = small_net(), images()
    once = cut(net, low_rank(chosen))
    assert relative_error(outputs(cut(once, second), x), outputs(masked(once, second), x)) <= 1e-12
    combined = combine(net, low_rank(chosen), second)
    same = {name: tensor.shape for name, tensor in cut(net, combined).state_dict().items()}
    assert same == {name: tensor.shape for name, tensor in cut(once, second).state_dict().items()}


@given(first=PLANS, data=st.data())
def test_a_sliced_network_can_be_factorised(first: Plan, data: st.DataObject) -> None:
    net, x = small_net(), images()
    once = cut(net, first)
    most = {
        layer.name: min(once.get_submodule(layer.name).weight.shape)
        for layer in structure(once).layers
    }
    chosen = {name: data.draw(st.integers(1, high)) for name, high in most.items() if high}
    second = low_rank(chosen)
    actual = outputs(cut(net, combine(net, first, second)), x)
    assert relative_error(actual, outputs(cut(once, second), x)) <= 1e-10


def test_the_input_is_not_touched_and_nothing_is_shared() -> None:
    net = small_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    compact = cut(net, low_rank({path(0, "qkv.q"): 3, path(1, "fc1"): 5, path(1, "qkv"): 4}))
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_layers_are_where_the_plan_says() -> None:
    compact = cut(small_net(), low_rank({path(0, "qkv.k"): 3, path(0, "fc2"): 5}))
    split = compact.get_submodule(path(0, "qkv"))
    assert isinstance(split, SplitLinear)
    assert [type(split.get_submodule(piece)) for piece in "qkv"] == [
        nn.Linear,
        LowRankLinear,
        nn.Linear,
    ]
    fc2 = compact.get_submodule(path(0, "fc2"))
    assert isinstance(fc2, LowRankLinear)
    assert (fc2.in_features, fc2.rank, fc2.out_features) == (48, 5, 24)
    assert (split.in_features, split.out_features) == (24, 72)


def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    plan = low_rank(
        {path(0, "qkv.q"): 3, path(0, "fc1"): 5, path(1, "qkv"): 4},
        plan_of({"blocks.0.attn.input": range(20), "blocks.1.attn.qk": range(0, 24, 2)}),
    )
    compact = cut(small_net(dtype=torch.float32), plan)
    save(tmp_path, compact, plan)
    net, read = load(tmp_path)
    x = images(dtype=torch.float32)
    assert read == plan
    assert torch.equal(outputs(net, x), outputs(compact, x))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"blocks.0.mlp.fc3": 2}, "unknown linear 'blocks.0.mlp.fc3'"),
        ({"blocks.0.mlp.fc1": 25}, "rank 25 is above its maximum of 24"),
        (
            {"blocks.0.attn.qkv": 3, "blocks.0.attn.qkv.q": 3},
            "together with the layer it is part of",
        ),
        ({"patch_embed.proj": 3}, "unknown linear"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: dict[str, int], message: str) -> None:
    for apply in (cut, masked):
        with pytest.raises(PlanError, match=message):
            apply(small_net(), low_rank(ranks))


def test_a_layer_is_not_factorised_twice() -> None:
    once = cut(small_net(), low_rank({path(0, "fc1"): 5}))
    for name in (path(0, "fc1"), path(0, "fc1.up")):
        with pytest.raises(PlanError, match="unknown linear"):
            cut(once, low_rank({name: 2}))
    twice = Keep(site="blocks.0.mlp.hidden", index=(0, 3))
    assert cut(once, Plan(model=MODEL, edits=(twice,))).get_submodule(path(0, "fc1")).rank == 5
