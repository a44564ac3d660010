"""Dropped branches in plans: cutting, masking, counting, saving, combining."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nets import MODEL, PLANS, images, outputs, plan_of, relative_error, small_net
from vitrim import Drop, Keep, LowRank, Plan, combine, count, cut, load, masked, save
from vitrim.budget.cost import Cost
from vitrim.network import branches, stream, structure
from vitrim.network.structure import members
from vitrim.plan import PlanError, dumps, loads

BRANCHES = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")


def dropping(names: Collection[str], first: Plan | None = None) -> Plan:
    """Return a plan that drops branches, with those slices of `first` that are not inside."""
    inside = members(structure(small_net()), names)
    keeps = [keep for keep in first.keeps() if keep.site not in inside] if first else []
    return Plan(model=MODEL, edits=(*(Drop(branch=name) for name in sorted(names)), *keeps))


def has_scales(net: nn.Module) -> bool:
    return any(name.endswith("gamma") for name, _ in net.named_parameters())


@given(first=PLANS, names=st.sets(st.sampled_from(BRANCHES)), scaled=st.booleans())
def test_cut_equals_masked_and_counts_what_the_formula_says(
    first: Plan, names: set[str], scaled: bool
) -> None:
    plan = dropping(names, first)
    net, x = small_net(init_values=0.5 if scaled else None), images()
    assert has_scales(net) == scaled
    compact = cut(net, plan)
    assert relative_error(outputs(compact, x), outputs(masked(net, plan), x)) <= 1e-12
    assert Cost(net, 32).plan(plan)[:2] == count(compact, 32)[:2]
    assert Cost(compact, 32).plan(Plan(model=MODEL, edits=()))[:2] == count(compact, 32)[:2]
    assert branches(compact) == tuple(name for name in BRANCHES if name not in names)
    assert loads(dumps(plan)) == plan


@given(names=st.sets(st.sampled_from(BRANCHES), min_size=1))
def test_nothing_of_a_dropped_branch_is_left(names: set[str]) -> None:
    net = small_net(init_values=0.5)
    kept = dict(cut(net, dropping(names)).named_parameters())
    dense = dict(net.named_parameters())
    branches = {name.rsplit(".", 1)[0] + ("1" if name.endswith("attn") else "2") for name in names}
    lost = {name for name in dense if name not in kept}
    assert {name for name in lost if ".ls" in name or ".norm" in name} == {
        name for name in dense if any(part in name for part in norms_and_scales(branches))
    }
    assert all(torch.equal(tensor, dense[name]) for name, tensor in kept.items())


def norms_and_scales(branches: Collection[str]) -> list[str]:
    """Return the norm and layer scale of each branch, given as block and number."""
    return [f"{name[:-1]}.{kind}{name[-1]}." for name in branches for kind in ("norm", "ls")]


@given(names=st.sets(st.sampled_from(BRANCHES), min_size=1, max_size=3))
def test_the_stream_of_what_is_left_leads_to_the_features(names: set[str]) -> None:
    compact, x = cut(small_net(init_values=0.5), dropping(names)), images()
    described = stream(compact)
    with torch.no_grad():
        tokens = described.embed(x)
        for branch in described.branches:
            tokens = tokens + branch.apply(tokens)
        tokens = compact.get_submodule(described.final_norm)(tokens)
        assert relative_error(tokens, compact.forward_features(x)) <= 1e-12  # type: ignore[operator]


@given(first=PLANS, names=st.sets(st.sampled_from(BRANCHES), min_size=1), second=PLANS)
def test_two_cuts_equal_one_by_the_composed_plan(
    first: Plan, names: set[str], second: Plan
) -> None:
    net, x = small_net(), images()
    for one, other in ((first, dropping(names)), (dropping(names), fitting(net, names, second))):
        plan = combine(net, one, other)
        twice = cut(cut(net, one), other)
        assert relative_error(outputs(cut(net, plan), x), outputs(twice, x)) <= 1e-12
        assert count(twice, 32)[:2] == Cost(net, 32).plan(plan)[:2]


def fitting(net: nn.Module, names: set[str], plan: Plan) -> Plan:
    return Plan(model=MODEL, edits=dropping(names, plan).edits[len(names) :])


def test_composing_forgets_edits_inside_a_branch_that_goes() -> None:
    net = small_net()
    low = LowRank(linear="blocks.0.mlp.fc2", rank=3)
    first = Plan(model=MODEL, edits=(*plan_of({"blocks.0.mlp.hidden": (0, 1)}).edits, low))
    combined = combine(net, first, dropping({"blocks.0.mlp"}))
    assert combined.edits == (Drop(branch="blocks.0.mlp"),)


def test_a_dropped_branch_survives_saving_bit_for_bit(tmp_path: Path) -> None:
    plan = dropping({"blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"})
    compact = cut(small_net(dtype=torch.float32), plan)
    save(tmp_path, compact, plan)
    again, read = load(tmp_path)
    x = images(dtype=torch.float32)
    assert read == plan
    assert torch.equal(outputs(again, x), outputs(compact, x))


def test_every_parameter_left_gets_a_gradient_and_keeps_its_mode() -> None:
    for training in (False, True):
        net = small_net().train(training)
        compact = cut(net, dropping({"blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"}))
        assert {module.training for module in compact.modules()} == {training}
        compact(images()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in compact.parameters())


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ((Drop(branch="blocks.7.attn"),), "unknown branch 'blocks.7.attn': expected one of blocks"),
        (
            (Drop(branch="blocks.0.mlp"), Keep(site="blocks.0.mlp.hidden", index=(0,))),
            "'blocks.0.mlp.hidden' is edited, but its branch is dropped",
        ),
        (
            (Drop(branch="blocks.0.attn"), LowRank(linear="blocks.0.attn.qkv.q", rank=1)),
            "'blocks.0.attn.qkv.q' is edited, but its branch is dropped",
        ),
        (
            (Drop(branch="blocks.0.attn"), Keep(site="blocks.0.attn.heads", index=(0,))),
            "'blocks.0.attn.heads' is edited, but its branch is dropped",
        ),
    ],
)
def test_an_impossible_drop_is_refused(edits: tuple[Drop, ...], message: str) -> None:
    for make in (cut, masked, lambda net, plan: Cost(net, 32).plan(plan)):
        with pytest.raises(PlanError, match=message):
            make(small_net(), Plan(model=MODEL, edits=edits))
    with pytest.raises(PlanError, match="unknown branch"):
        combine(small_net(), dropping({"blocks.0.mlp"}), dropping({"blocks.0.mlp"}))
