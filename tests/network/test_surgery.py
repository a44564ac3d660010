from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import timm
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.version import Version
from timm.layers import set_fused_attn
from torch import Tensor, nn

from nets import (
    MODEL,
    PLANS,
    TINY,
    images,
    outputs,
    plan_of,
    plans,
    relative_error,
    silenced,
    skeleton_net,
    small_net,
)
from vitrim import Plan, combine, cut, masked
from vitrim.network import sites
from vitrim.network.attention import GatheredLinear, SlicedAttention
from vitrim.network.head_runs import ARRANGEMENTS, arrange_heads
from vitrim.plan import PlanError, dumps, loads

EMPTY = plan_of({})
HALF_HEADS = plan_of({f"blocks.{i}.attn.qk": range(0, 24, 2) for i in (0, 1)})
"""Every head keeps 4 of its 8 query-key dims."""
UNEQUAL = plan_of(
    {
        "blocks.0.attn.qk": (0, 1, 2, 8, 16, 17),
        "blocks.0.attn.v": (0, 8, 9, 10, 11, 16),
        "blocks.1.attn.heads": (0, 2),
    }
)
"""Heads of widths (3, 1, 2) for queries and keys and (1, 4, 1) for values."""
NO_QK = plan_of({"blocks.0.attn.qk": (0, 1, 20), "blocks.1.attn.qk": (9,)})
"""In block 0 the second head, in block 1 the first and the third have no query-key dims."""
NO_V = plan_of({"blocks.0.attn.v": (1, 2, 17), "blocks.1.attn.v": (12,)})
"""In block 0 the second head, in block 1 the first and the third have no value dims."""
EVERYTHING = plan_of(
    {
        f"blocks.{i}.{site}": index
        for i in (0, 1)
        for site, index in {
            "attn.input": (0, 5, 23),
            "attn.heads": (1, 2),
            "attn.qk": (3, 9, 16, 23),
            "attn.v": (0, 8, 9, 22),
            "mlp.input": (7,),
            "mlp.hidden": (0, 47),
        }.items()
    }
)
EDGES = [HALF_HEADS, UNEQUAL, NO_QK, NO_V, EVERYTHING]
IDS = ["half of every head", "unequal heads", "no qk dims", "no v dims", "everywhere"]


@cache
def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return small_net(dtype=dtype)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that only one has, or that are not equal to the bit."""
    same = {name for name in actual.keys() & expected if torch.equal(actual[name], expected[name])}
    return sorted((actual.keys() | expected) - same)


def attentions(module: nn.Module) -> Iterator[SlicedAttention]:
    return (part for part in module.modules() if isinstance(part, SlicedAttention))


def fuse(module: nn.Module, *, fused: bool) -> nn.Module:
    for block in module.blocks:
        block.attn.fused_attn = fused
    return module


@pytest.fixture
def choose_kernel() -> Iterator[Callable[[bool], None]]:
    yield set_fused_attn
    set_fused_attn(True)


@given(PLANS)
@example(UNEQUAL)
@example(NO_QK)
@example(NO_V)
@example(EVERYTHING)
def test_cut_equals_masked_and_silenced_activations(plan: Plan) -> None:
    x = images()
    actual = outputs(cut(net(), plan), x)
    assert relative_error(actual, outputs(masked(net(), plan), x)) <= 1e-12
    assert relative_error(actual, outputs(silenced(net(), plan), x)) <= 1e-12


@given(PLANS)
@example(NO_QK)
@example(EVERYTHING)
def test_cut_equals_masked_in_single_precision(plan: Plan) -> None:
    x = images(dtype=torch.float32)
    actual = outputs(cut(net(torch.float32), plan), x)
    assert relative_error(actual, outputs(masked(net(torch.float32), plan), x)) <= 1e-5


@given(first=PLANS, data=st.data())
def test_a_cut_network_can_be_cut_and_masked_again(first: Plan, data: st.DataObject) -> None:
    once = cut(net(), first)
    second = data.draw(plans(sites(once)))
    x = images()
    actual = outputs(cut(once, second), x)
    assert relative_error(actual, outputs(masked(once, second), x)) <= 1e-12


@given(PLANS)
def test_masked_leaves_as_many_numbers_as_cut(plan: Plan) -> None:
    twin, small = masked(net(), plan), cut(net(), plan)
    assert [p.shape for p in twin.parameters()] == [p.shape for p in net().parameters()]
    assert sum(int(p.count_nonzero()) for p in twin.parameters()) == sum(
        p.numel() for p in small.parameters()
    )


@pytest.mark.parametrize("plan", EDGES, ids=IDS)
def test_the_cut_network_is_smaller_and_has_no_mask_left(plan: Plan) -> None:
    small = cut(net(), plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net().parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in small.modules())
    assert all(tensor.is_contiguous() for tensor in small.state_dict().values())
    assert all((row != 0).any() for p in small.parameters() for row in p)


def test_heads_take_the_widths_of_the_plan() -> None:
    widths = [(a.qk_dims, a.v_dims) for a in attentions(cut(net(), UNEQUAL))]
    assert widths == [((3, 1, 2), (1, 4, 1)), ((8, 8), (8, 8))]
    assert [a.qk_dims for a in attentions(cut(net(), NO_QK))] == [(2, 0, 1), (0, 1, 0)]
    without_v = [(a.qk_dims, a.v_dims) for a in attentions(cut(net(), NO_V))]
    assert without_v == [((8, 8), (2, 1)), ((8,), (1,))]


def test_inputs_are_gathered_and_the_residual_stream_keeps_its_width() -> None:
    block = cut(net(), EVERYTHING).blocks[0]
    assert isinstance(block.attn.qkv, GatheredLinear)
    assert block.attn.qkv.weight.shape == (2 * 3 + 3, 3)
    assert block.mlp.fc1.weight.shape == (2, 1)
    assert block.mlp.fc2.weight.shape == (24, 2)
    assert block.attn.proj.weight.shape == (24, 3)
    assert block.norm1.weight.shape == (24,)


@given(PLANS)
@example(UNEQUAL)
@example(NO_QK)
def test_fused_and_plain_attention_agree(plan: Plan) -> None:
    x = images()
    plain, fast = (fuse(cut(net(), plan), fused=fused) for fused in (False, True))
    expected = outputs(plain, x)
    for arrangement in ARRANGEMENTS:
        assert relative_error(outputs(arrange_heads(fast, arrangement), x), expected) <= 1e-12


@pytest.mark.parametrize("plan", [UNEQUAL, NO_QK], ids=["unequal", "no query-key dims"])
def test_gradients_are_the_same_however_heads_are_run(plan: Plan) -> None:
    small = cut(net(), plan)
    gradients = []
    for arrangement in ARRANGEMENTS:
        small.zero_grad()
        arrange_heads(small, arrangement)(images()).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten().clone() for p in small.parameters()]))
    assert relative_error(gradients[1], gradients[0]) <= 1e-12
    assert relative_error(gradients[2], gradients[0]) <= 1e-12


@pytest.mark.parametrize("plan", EDGES, ids=IDS)
def test_the_kernel_chosen_at_construction_survives_the_cut(
    plan: Plan, choose_kernel: Callable[[bool], None]
) -> None:
    results = []
    for fused in (False, True):
        choose_kernel(fused)
        small = cut(small_net(), plan)
        assert all(block.attn.fused_attn == fused for block in small.blocks)
        results.append(outputs(small, images()))
    assert relative_error(*results) <= 1e-12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("plan", EDGES, ids=IDS)
def test_attention_masks_mean_the_same_after_the_cut(plan: Plan, fused: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    pair = [fuse(make(net(), plan), fused=fused) for make in (cut, masked)]
    masks: list[dict[str, Any]] = [{"attn_mask": bias}]
    if Version(timm.__version__) >= Version("1.0.26"):  # earlier, only the fused kernel had masks
        masks += [{"attn_mask": bias > 0}, {"is_causal": True}]
    for given_mask in masks:
        for block in (0, 1):  # the fused kernel runs where a head's two widths are equal
            actual, expected = (twin.blocks[block].attn(x, **given_mask) for twin in pair)
            assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("plan", EDGES, ids=IDS)
def test_every_parameter_of_the_cut_network_gets_a_gradient(plan: Plan, fused: bool) -> None:
    small = fuse(cut(net(), plan), fused=fused)
    small(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in small.parameters())
    for block in small.blocks:
        attn = block.attn
        qk = (attn.qkv.out_features - attn.proj.in_features) // 2
        weight, bias = attn.qkv.weight.grad, attn.qkv.bias.grad
        assert weight.any(dim=1).all()
        assert bias[:qk].all()
        assert bias[2 * qk :].all()
        assert bias[qk : 2 * qk].abs().max() <= 1e-12 * bias.abs().max()  # softmax ignores a shift


def gatherer(name: str) -> str:
    """Return the path of the gather in place of that of the Linear behind it."""
    return name.removesuffix(".linear")


def parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names in the state dict."""
    return {
        f"{gatherer(name.rpartition('.')[0])}.{name.rpartition('.')[2]}".removeprefix("."): p
        for name, p in net.named_parameters()
    }


def test_training_moves_the_cut_network_and_no_other() -> None:
    before, small = state(net()), cut(net(), EVERYTHING)
    untrained = state(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()(images()).square().sum().backward()
    optimizer.step()
    assert not [name for name, p in parameters(small).items() if torch.equal(p, untrained[name])]
    assert not differing(state(net()), before)


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_the_new_width_would_be_wrong(fused: bool) -> None:
    x, expected = images(), outputs(masked(net(), HALF_HEADS), images())
    small = fuse(cut(net(), HALF_HEADS), fused=fused)
    assert relative_error(outputs(small, x), expected) <= 1e-12
    for attention in attentions(small):
        assert attention.qk_dims == (4, 4, 4)
        attention.scale = 4**-0.5
    assert relative_error(outputs(small, x), expected) > 1e-3


@pytest.mark.parametrize(
    "plan",
    [EMPTY, plan_of({name: range(site.size) for name, site in sites(small_net()).items()})],
    ids=["no edits", "every unit kept"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_removed_is_bit_identical(plan: Plan, dtype: torch.dtype) -> None:
    x, dense = images(dtype=dtype), net(dtype)
    for twin in (cut(dense, plan), masked(dense, plan)):
        assert not differing(state(twin), state(dense))
        assert torch.equal(outputs(twin, x), outputs(dense, x))
        assert [type(m) for m in twin.modules()] == [type(m) for m in dense.modules()]


@pytest.mark.parametrize("make", [cut, masked])
@pytest.mark.parametrize("plan", [EMPTY, *EDGES], ids=["no edits", *IDS])
@pytest.mark.parametrize("already_cut", [False, True])
def test_the_input_is_untouched_and_shares_no_memory(
    make: Callable[[nn.Module, Plan], nn.Module], plan: Plan, already_cut: bool
) -> None:
    dense = cut(net(), EVERYTHING) if already_cut else net()
    plan = plan_of({"blocks.0.mlp.hidden": (1,)}) if already_cut and plan.edits else plan
    before, logits = state(dense), outputs(dense, images())
    twin = make(dense, plan)
    assert not differing(state(dense), before)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    assert not differing(state(dense), before)
    assert torch.equal(outputs(dense, images()), logits)


def test_what_is_trained_and_the_precision_stay() -> None:
    dense = small_net(dtype=torch.float32)
    dense.blocks[0].requires_grad_(False)
    small = cut(dense, EVERYTHING)
    frozen = {name for name, p in parameters(small).items() if not p.requires_grad}
    assert frozen == {name for name, p in parameters(dense).items() if not p.requires_grad}
    assert frozen
    assert {p.dtype for p in small.parameters()} == {torch.float32}


@pytest.mark.parametrize("training", [False, True])
def test_every_module_stays_in_its_mode(training: bool) -> None:
    dense = small_net().train(training)
    for part in (dense.blocks[0].attn.attn_drop, dense.blocks[1].attn, dense.blocks[1].mlp.fc1):
        part.train(not training)
    modes = {name: module.training for name, module in dense.named_modules()}
    for make in (cut, masked):
        twin = make(dense, EVERYTHING)
        found = {
            gatherer(name): module.training  # the Linear behind a gather is in its mode
            for name, module in reversed([*twin.named_modules()])
        }
        assert found == modes


def test_the_meta_device_gives_the_same_shapes() -> None:
    small = cut(skeleton_net(**TINY), EVERYTHING)
    expected = {name: tensor.shape for name, tensor in cut(net(), EVERYTHING).state_dict().items()}
    assert {name: tensor.shape for name, tensor in small.state_dict().items()} == expected
    assert all(tensor.is_meta for tensor in small.parameters())


def same_after(first: Plan, second: Plan, dense: nn.Module | None = None) -> None:
    """Assert that two cuts and the cut by the combined plan give the same network, to the bit."""
    dense = net() if dense is None else dense
    twice = cut(cut(dense, first), second)
    once = cut(dense, combine(dense, first, second))
    assert not differing(state(once), state(twice))
    assert torch.equal(outputs(once, images()), outputs(twice, images()))


@given(first=PLANS, data=st.data())
def test_two_cuts_equal_one_by_the_composed_plan(first: Plan, data: st.DataObject) -> None:
    same_after(first, data.draw(plans(sites(cut(net(), first)))))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"attn.qk": (0, 1, 5)}, {"attn.heads": (1, 2)}),
        ({"attn.qk": (0, 1, 5)}, {"attn.v": range(8, 24)}),
        ({"attn.qk": (0, 1, 5)}, {"attn.heads": (2,), "attn.qk": (0,)}),
        ({"attn.qk": (0, 1, 5)}, {"attn.heads": (0, 1)}),
        ({"attn.qk": (8,), "attn.v": (16,)}, {}),
        ({"attn.qk": (8,), "attn.heads": (0, 2)}, {"attn.heads": (1,)}),
    ],
    ids=["by head", "by values", "by head, dims asked for", "not it", "before", "before, and more"],
)
def test_composing_may_remove_the_only_head_with_query_key_dims(
    first: dict[str, Sequence[int]], second: dict[str, Sequence[int]]
) -> None:
    same_after(*(plan_of({f"blocks.0.{k}": v for k, v in x.items()}) for x in (first, second)))


@given(before=PLANS, data=st.data())
def test_plans_of_an_already_cut_network_compose_too(before: Plan, data: st.DataObject) -> None:
    dense = cut(net(), before)
    first = data.draw(plans(sites(dense)))
    same_after(first, data.draw(plans(sites(cut(dense, first)))), dense)


def test_the_heads_kept_of_a_cut_network_may_never_have_had_query_key_dims() -> None:
    dense = cut(net(), plan_of({"blocks.0.attn.qk": (0, 1)}))
    same_after(plan_of({"blocks.0.attn.heads": (1, 2)}), EMPTY, dense)
    same_after(EMPTY, plan_of({"blocks.0.attn.heads": (1, 2)}), dense)


@pytest.mark.parametrize("plan", EDGES, ids=IDS)
def test_combining_with_nothing_changes_nothing(plan: Plan) -> None:
    same_after(EMPTY, plan)
    same_after(plan, EMPTY)


def test_a_combined_plan_counts_in_units_of_the_dense_network() -> None:
    site = "blocks.0.mlp.hidden"
    plan = combine(net(), plan_of({site: (2, 5, 7, 9)}), plan_of({site: (1, 3)}))
    assert [(keep.site, keep.index) for keep in plan.keeps()] == [(site, (5, 9))]
    assert plan.model == MODEL


def test_a_combined_plan_names_its_methods() -> None:
    plans = [
        Plan(model=MODEL, edits=(), method=name, provenance={"strength": strength})
        for name, strength in (("oneshot", 2), ("vtp", 1), ("mixed_rank", 3))
    ]
    plan = combine(net(), combine(net(), *plans[:2]), plans[2])
    assert plan.method == "oneshot+vtp+mixed_rank"
    assert plan.provenance == {
        "steps": [
            {"method": "oneshot", "strength": 2},
            {"method": "vtp", "strength": 1},
            {"method": "mixed_rank", "strength": 3},
        ]
    }
    assert combine(net(), EMPTY, plans[0]).method == "oneshot"


@pytest.mark.parametrize("method", ["", "mixed_rank"])
def test_a_plan_combined_many_times_can_still_be_read(method: str) -> None:
    plan = EMPTY
    for width in range(45, 5, -1):
        second = replace(plan_of({"blocks.0.mlp.hidden": range(width)}), method=method)
        plan = combine(net(), plan, second)
    assert loads(dumps(plan)) == plan


@pytest.mark.parametrize("make", [cut, masked])
@pytest.mark.parametrize(
    ("kept", "named"),
    [
        ({"blocks.2.mlp.hidden": (0,)}, "blocks.2.mlp.hidden"),
        ({"blocks.0.mlp": (0,)}, "blocks.0.mlp"),
        ({"patch_embed": (0,)}, "patch_embed"),
        ({"blocks.0.mlp.hidden": (0, 48)}, "48 is out of range"),
        ({"blocks.1.attn.heads": (3,)}, "3 is out of range"),
        ({"blocks.0.attn.heads": (0,), "blocks.0.attn.v": (8, 9)}, "blocks.0.attn: no kept head"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    make: Callable[[nn.Module, Plan], nn.Module], kept: dict[str, tuple[int, ...]], named: str
) -> None:
    before = state(net())
    with pytest.raises(PlanError, match=named):
        make(net(), plan_of(kept))
    assert not differing(state(net()), before)
