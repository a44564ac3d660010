"""Allocation: budgets are met to within one step, and more budget never predicts more loss."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nets import SIZE, small_net
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.method.joint.allocation import Allocated, Limits, Losses, UnreachableError, allocate
from vitrim.method.joint.budgets import Budgets
from vitrim.method.joint.paths import Path, Steps, first_within
from vitrim.network.survivors import resolve
from vitrim.plan import Drop, Int8, LowRank, Plan

NET = small_net(patch_size=4)
COST = Cost(NET, SIZE)
HOW = Limits(round_to=1, even_heads=False, heads=True, max_rank_fraction=0.7)


def random_losses(seed: int, *, ranks: bool = True, int8: bool = True) -> Losses:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.rand(n, generator=generator, dtype=torch.float64) ** 3

    described = COST.structure
    return Losses(
        units={
            site.name: draw(site.size)
            for site in described.sites.values()
            if site.kind in ("hidden", "qk", "v")
        },
        components={
            layer.name: draw(min(sum(p.size for p in dim) for dim in (layer.out, layer.inp)))
            .sort(descending=True)
            .values
            for layer in described.layers
            if ranks
        },
        branches={
            name: float(draw(1, 20.0))
            for branch in described.branches
            for name in (branch.name, branch.block)
        },
        int8={name: float(draw(1, 0.01)) for name in COST.linears} if int8 else {},
    )


def allocated(losses: Losses, *targets: Target, how: Limits = HOW) -> tuple[Allocated, Budgets]:
    first, *others = targets
    target = Target(metric=first.metric, keep=first.keep, others=tuple(others))
    budgets = Budgets(COST, target, [*losses.units], even_heads=how.even_heads)
    found = allocate(COST.structure, losses, budgets, budgets.limits, how)
    return found, budgets


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.45, 0.999))
@pytest.mark.parametrize("metric", ["macs", "params", "size_mb"])
def test_a_budget_is_met_and_what_is_predicted_is_what_goes(
    metric: str, seed: int, keep: float
) -> None:
    size = COST.total("size_bytes") / 1e6
    target = Target(metric=metric, keep=keep * size if metric == "size_mb" else keep)
    losses = random_losses(seed)
    found, budgets = allocated(losses, target)
    assert found.remaining == pytest.approx(budgets.of_edits(found.edits), rel=1e-12)
    assert (budgets.of_edits(found.edits) <= budgets.limits + 1e-6).all()
    resolve(COST.structure, Plan(model={}, edits=found.edits))


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_more_budget_never_predicts_more_loss(seed: int, data: st.DataObject) -> None:
    losses = random_losses(seed)
    low, high = sorted((data.draw(st.floats(0.45, 1.0)), data.draw(st.floats(0.45, 1.0))))
    less, more = (allocated(losses, Target(metric="macs", keep=keep))[0] for keep in (low, high))
    assert more.loss <= less.loss + 1e-12


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.6, 0.99))
def test_units_alone_end_less_than_one_of_them_below_the_budget(seed: int, keep: float) -> None:
    losses = Losses(units=random_losses(seed).units)
    found, budgets = allocated(losses, Target(metric="macs", keep=keep), how=HOW)
    room = budgets.limits - found.remaining
    per_head = COST.dense_count.macs * 0.02  # the last value of a head takes its queries along
    assert 0 <= room[0] < per_head


def test_a_budget_of_everything_removes_nothing() -> None:
    found, _ = allocated(random_losses(0), Target(metric="macs", keep=1.0))
    assert found.edits == ()
    assert found.loss == 0.0


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), macs=st.floats(0.6, 0.9), size=st.floats(0.5, 0.9))
def test_two_budgets_are_both_met_and_the_binding_one_is_named(
    seed: int, macs: float, size: float
) -> None:
    total = COST.total("size_bytes") / 1e6
    targets = Target(metric="macs", keep=macs), Target(metric="size_mb", keep=size * total)
    found, budgets = allocated(random_losses(seed), *targets)
    assert (budgets.of_edits(found.edits) <= budgets.limits + 1e-6).all()
    assert budgets.binding(found.remaining).startswith(("target.macs=", "target.size_mb="))


def test_each_kind_of_edit_is_chosen_where_it_is_free() -> None:
    losses = random_losses(1)
    free = Losses(
        units=losses.units,
        components={name: 0 * value for name, value in losses.components.items()},
        branches={**losses.branches, "blocks.1.attn": 0.0},
        int8={name: 0.0 for name in losses.int8},
    )
    found, _ = allocated(free, Target(metric="size_mb", keep=0.45 * COST.total("size_bytes") / 1e6))
    kinds = {type(edit) for edit in found.edits}
    assert {Drop, Int8} <= kinds or {LowRank, Int8} <= kinds


def test_a_block_costs_what_was_measured_for_both_branches_together() -> None:
    losses = Losses(
        branches={"blocks.0.attn": 1.0, "blocks.0.mlp": 1.0, "blocks.0": 0.5, "blocks.1.mlp": 0.9}
    )
    found, _ = allocated(losses, Target(metric="macs", keep=0.7))
    assert {edit.branch for edit in found.edits} == {"blocks.0.attn", "blocks.0.mlp"}
    assert found.loss == 0.5


def test_what_cannot_be_reached_says_how_far_it_goes() -> None:
    losses = Losses(units=random_losses(0).units)
    target = Target(metric="macs", keep=0.001)
    budgets = Budgets(COST, target, [*losses.units], even_heads=False)
    with pytest.raises(UnreachableError) as error:
        allocate(COST.structure, losses, budgets, budgets.limits, HOW)
    message = str(budgets.unreachable(error.value.least))
    assert "target.macs=0.001 cannot be reached" in message
    assert "go down to" in message
    assert isinstance(budgets.unreachable(error.value.least), TargetError)


def test_the_first_state_within_the_budget_is_taken() -> None:
    steps = Steps("a", np.array([1.0, 2.0, 4.0]), np.ones((3, 1)))
    path = Path(0.5, np.array([10.0]), [steps])
    found = first_within(path, np.array([8.0]), np.array([1.0]))
    assert found.counts == {"a": 2}
    assert found.loss == 3.5
    assert found.remaining == [8.0]
    assert first_within(path, np.array([6.9]), np.array([1.0])) is None
