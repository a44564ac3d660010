"""Targets: strengths, levels, and what may be set in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrim.budget.target import Target, TargetError, at_strength, resolve_target

LEVELS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


def at(
    strength: Any,
    levels: Sequence[float] = LEVELS,
    target: Mapping[str, Any] | None = None,
    metric: Any = "units",
) -> Target:
    return resolve_target(strength, target or {}, levels=levels, metric=metric, where="a.yaml")


@pytest.mark.parametrize("metric", ["macs", "params", "units"])
@pytest.mark.parametrize(
    "keep",
    [0, 0.0, 1.2, 2.5, -1, -0.5, "x", "0.5", float("nan"), float("inf"), True, False, None, [0.5]],
    ids=repr,
)
def test_a_target_that_is_no_share_and_no_count_is_refused(metric: Any, keep: Any) -> None:
    with pytest.raises(TargetError, match=f"target.{metric}"):
        Target(metric=metric, keep=keep)


@pytest.mark.parametrize("metric", ["flops", "blocks_ms", "", "MACS"])
def test_a_target_of_another_metric_is_refused(metric: Any) -> None:
    with pytest.raises(TargetError, match="macs, params, units"):
        Target(metric=metric, keep=0.5)


@pytest.mark.parametrize(
    ("keep", "dense", "limit"),
    [(0.7, 10, 7), (0.5, 7, 3), (1.0, 9, 9), (1, 9, 9), (2, 9, 2), (8.0, 8, 8), (0.1, 30, 3)],
)
def test_the_limit_is_a_whole_number_and_at_most_the_dense_one(
    keep: float, dense: int, limit: int
) -> None:
    assert Target(metric="units", keep=keep).limit(dense) == limit


@given(st.floats(0, 5))
def test_strengths_interpolate_between_the_levels(strength: float) -> None:
    below = math.floor(strength)
    expected = 1 - 0.1 * below - 0.1 * (strength - below)
    assert at_strength(strength, LEVELS) == pytest.approx(expected, abs=1e-9)


def test_whole_and_half_strengths_are_exact() -> None:
    assert [at_strength(strength, LEVELS) for strength in range(6)] == LEVELS
    assert at_strength(2.5, LEVELS) == 0.75
    assert at_strength(2.5, [1.0, 0.9, 0.8, 0.2, 0.1, 0.05]) == 0.5
    assert at_strength(0, LEVELS) == 1


@pytest.mark.parametrize("strength", [0, 5, 0.0, 2.5, 5.0])
def test_strengths_from_0_to_5_are_allowed(strength: float) -> None:
    at(strength)


@pytest.mark.parametrize(
    "strength", [-1, -1e-9, 5.1, "x", "3", float("nan"), float("inf"), True, [3]], ids=repr
)
def test_other_strengths_are_refused(strength: Any) -> None:
    with pytest.raises(TargetError, match=r"strength=.*0 to 5 .*a\.yaml"):
        at(strength)


@pytest.mark.parametrize(
    "levels",
    [
        [],
        LEVELS[:5],
        [*LEVELS, 0.4],
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        [1.0, 0.9, 0.9, 0.7, 0.6, 0.5],
        [1.0, 0.9, 0.95, 0.7, 0.6, 0.5],
        [1.0, 0.8, 0.6, 0.4, 0.2, 0.0],
        [1.0, 0.8, 0.6, 0.4, 0.2, -0.1],
        [1.0, 0.9, float("nan"), 0.7, 0.6, 0.5],
        LEVELS[::-1],
    ],
    ids=str,
)
def test_levels_that_do_not_fall_from_1_to_above_0_are_refused(levels: list[float]) -> None:
    with pytest.raises(TargetError, match=r"levels=.*a\.yaml"):
        at(3, levels)


def test_the_target_that_is_set_overrides_the_strength() -> None:
    none = {"macs": None, "params": None, "units": None}
    assert at(3, target=none) == Target(metric="units", keep=0.7)
    assert at(3, metric="macs") == Target(metric="macs", keep=0.7)
    for metric in ("macs", "params", "units"):
        assert at(3, target={**none, metric: 0.4}) == Target(metric=metric, keep=0.4)


def test_a_target_needs_no_strength() -> None:
    assert at(None, target={"macs": 0.5}) == Target(metric="macs", keep=0.5)
    with pytest.raises(TargetError, match="strength=null"):
        at(None)


@pytest.mark.parametrize("target", [{"macs": 0.5}, {}], ids=str)
def test_what_removes_nothing_has_strength_0_and_no_target(target: dict[str, Any]) -> None:
    assert at(0, [1.0], metric="macs").is_identity
    with pytest.raises(TargetError, match=r"a\.yaml removes nothing: set strength=0"):
        at(0 if target else 3, [1.0], target)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ({"macs": 0.5, "params": 0.5}, "target.macs, target.params"),
        ({"macs": 0.5, "params": 0.5, "units": 0.5}, "target.macs, target.params, target.units"),
        ({"flops": 0.5}, "target.flops"),
        ({"macs": 0}, "target.macs=0"),
    ],
)
def test_at_most_one_known_target_may_be_set(target: dict[str, Any], named: str) -> None:
    with pytest.raises(TargetError, match=named):
        at(3, target=target)


@pytest.mark.parametrize("keep", [0, -1, "many", True])
def test_a_budget_in_blocks_is_a_positive_number(keep: Any) -> None:
    with pytest.raises(TargetError, match=f"target.blocks={keep}: expected how many blocks"):
        Target(metric="blocks", keep=keep)


@pytest.mark.parametrize("keep", [0, -1, "many", True])
def test_a_size_is_in_megabytes(keep: Any) -> None:
    with pytest.raises(TargetError, match=f"target.size_mb={keep}: expected megabytes"):
        Target(metric="size_mb", keep=keep)


def test_a_size_counts_bytes_and_is_below_that_of_the_dense_network() -> None:
    target = Target(metric="size_mb", keep=1)
    assert (target.limit(2_500_000), target.unit, target.is_identity) == (1_000_000, "bytes", False)
    with pytest.raises(TargetError, match=r"target.size_mb=1: expected at most the 0.5 MB"):
        target.limit(500_000)
