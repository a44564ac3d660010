"""Allocations of ranks: within the budget, to within one rank, and by hand where that is short."""

from __future__ import annotations

import itertools
import math

from hypothesis import assume, given
from hypothesis import strategies as st

from vitrim.method.mixed_rank.ranks import ALLOCATIONS, Allocation, Curve, allocate, least


@st.composite
def curves(draw: st.DrawFn) -> dict[str, Curve]:
    found = {}
    for index in range(draw(st.integers(1, 5))):
        rows, columns = draw(st.integers(2, 12)), draw(st.integers(2, 12))
        energy = draw(
            st.lists(st.floats(0, 100), min_size=min(rows, columns), max_size=min(rows, columns))
        )
        falling = sorted(energy, reverse=True)
        found[f"layer{index}"] = Curve(falling, rows + columns, rows * columns)
    return found


def spent(curves: dict[str, Curve], ranks: dict[str, int]) -> int:
    return sum(c.step * ranks[name] if name in ranks else c.dense for name, c in curves.items())


def error(curves: dict[str, Curve], ranks: dict[str, int]) -> float:
    return sum(math.fsum(curves[name].energy[rank:]) for name, rank in ranks.items())


@given(curves(), st.floats(0.05, 1.0), st.sampled_from(ALLOCATIONS), st.sampled_from([0.7, 1.0]))
def test_the_budget_is_met_to_within_one_rank(
    found: dict[str, Curve], share: float, how: Allocation, max_share: float
) -> None:
    limit = int(share * sum(curve.dense for curve in found.values()))
    assume(least(found, max_share) <= limit)
    ranks = allocate(found, limit, how=how, max_rank_fraction=max_share)
    assert spent(found, ranks) <= limit
    for name, rank in ranks.items():
        curve = found[name]
        assert 1 <= rank <= curve.break_even
        assert curve.step * rank < curve.dense
        if how == "nested":
            if rank < math.floor(max_share * curve.break_even):
                assert spent(found, ranks) + curve.step > limit
            continue
        if rank < curve.break_even:
            assert spent(found, ranks) + curve.step > limit
        assert limit - spent(found, ranks) < max(found[name].step for name in ranks)


@given(curves(), st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.sampled_from([0.7, 1.0]))
def test_nested_ranks_never_lose_more_with_a_larger_budget(
    found: dict[str, Curve], one: float, other: float, max_share: float
) -> None:
    whole = sum(curve.dense for curve in found.values())
    less, more = (int(share * whole) for share in sorted((one, other)))
    assume(least(found, max_share) <= less)
    small, large = (
        error(found, allocate(found, limit, how="nested", max_rank_fraction=max_share))
        for limit in (less, more)
    )
    assert large <= small * (1 + 1e-9)


@given(curves())
def test_what_costs_nothing_to_keep_is_kept(found: dict[str, Curve]) -> None:
    whole = sum(curve.dense for curve in found.values())
    for how in ALLOCATIONS:
        assert allocate(found, whole, how=how, max_rank_fraction=0.7) == {}


def test_hull_finds_the_best_allocation_of_a_small_case() -> None:
    found = {
        "steep": Curve([9.0, 4.0, 1.0, 0.5, 0.2, 0.1], 12, 36),
        "flat": Curve([2.0, 2.0, 2.0, 2.0, 2.0, 2.0], 12, 36),
        "tiny": Curve([0.1, 0.01, 0.01, 0.01, 0.01, 0.01], 12, 36),
    }
    limit = 36 + 24 + 12
    ranks = allocate(found, limit, how="hull", max_rank_fraction=1.0)
    assert ranks == {"tiny": 1, "steep": 2}
    options = itertools.product((1, 2, None), repeat=3)
    choices = [
        {name: r for name, r in zip(found, option, strict=True) if r is not None}
        for option in options
    ]
    assert error(found, ranks) == min(error(found, c) for c in choices if spent(found, c) <= limit)


def test_greedy_leaves_out_what_loses_least_of_its_own_layer_per_weight() -> None:
    found = {
        "loud": Curve([50.0, 40.0, 10.0, 5.0], 8, 24),
        "quiet": Curve([0.97, 0.01, 0.01, 0.01], 8, 24),
    }
    assert allocate(found, 32, how="greedy", max_rank_fraction=1.0) == {"quiet": 1}


@given(curves(), st.floats(0.2, 0.9))
def test_uniform_takes_the_same_share_of_every_layer(found: dict[str, Curve], share: float) -> None:
    limit = int(share * sum(curve.dense for curve in found.values()))
    assume(least(found, 1.0) <= limit)
    ranks = allocate(found, limit, how="uniform", max_rank_fraction=1.0)
    assume(ranks)
    shares = [ranks[n] * found[n].step / found[n].dense for n in ranks if ranks[n] > 1]
    steps = [found[name].step / found[name].dense for name in ranks]
    capped = any(ranks[name] == found[name].break_even for name in ranks)
    if shares and not capped:
        assert max(shares) - min(shares) <= 2 * max(steps)


def test_the_least_is_rank_one_wherever_that_saves_something() -> None:
    found = {"a": Curve([1.0] * 4, 8, 16), "b": Curve([1.0], 5, 4)}
    assert least(found, 1.0) == 12
    assert least(found, 0.4) == 20


def test_above_the_highest_share_goes_only_the_last_bit_of_a_budget() -> None:
    found = {name: Curve([8.0, 4.0, 2.0, 1.0] * 16, 128, 64 * 64) for name in "abcd"}
    ranks = allocate(found, 3 * 64 * 64 + 25 * 128, how="hull", max_rank_fraction=0.7)
    assert spent(found, ranks) > 3 * 64 * 64 + 24 * 128
    assert sum(rank > 0.7 * 31 for rank in ranks.values()) <= 1
