"""Targets: how much of a network may remain, by a strength or by a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from vitrim.errors import VitrimError, is_rate

Metric = Literal["macs", "params", "units", "blocks", "size_mb", "latency", "latency_ms"]
METRICS: tuple[Metric, ...] = get_args(Metric)
CountedMetric = Literal["macs", "params", "units", "size_bytes"]
"""What the closed formula counts (`vitrim.budget.cost.Amount`)."""
LEVELS = 6
"""Entries in a method's strength table: strengths 0, 1, 2, 3, 4 and 5."""


class TargetError(VitrimError):
    """A target that is not a number in range, or that no plan can reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Keep at most `keep` of `metric`: a fraction in (0, 1], or a whole number from 2 on.

    For blocks, `keep` is the number of blocks to remove, fractions included: the target is the MACs
    of the dense network minus those of that many blocks of mean size. For latency it is a fraction
    of the dense network's latency, for latency_ms a latency in milliseconds. For size_mb it is the
    size of the saved tensors in 1e6 bytes. `others` are further targets that must be met as well.
    """

    metric: Metric
    keep: float | int
    others: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise TargetError(f"target.{self.metric}: expected one of {', '.join(METRICS)}")
        if self.metric == "blocks":
            if not is_rate(self.keep) or self.keep == 0:
                raise TargetError(
                    f"target.blocks={self.keep}: expected how many blocks' MACs to remove, above 0"
                )
            return
        if self.is_time:
            relative = self.metric == "latency"
            if not is_rate(self.keep) or self.keep == 0 or (relative and self.keep > 1):
                raise TargetError(
                    f"target.{self.metric}={self.keep}: expected "
                    f"{'a fraction up to 1' if relative else 'milliseconds'}, above 0"
                )
            return
        if self.metric == "size_mb":
            if not is_rate(self.keep) or self.keep == 0:
                raise TargetError(
                    f"target.size_mb={self.keep}: expected megabytes (1e6 bytes), above 0"
                )
            return
        is_number = is_rate(self.keep) and self.keep >= 2 and self.keep == int(self.keep)
        if is_number or (is_rate(self.keep) and 0 < self.keep <= 1):
            return
        raise TargetError(
            f"target.{self.metric}={self.keep}: expected the fraction to keep, above 0 and at most "
            f"1, or the number of {self.metric} to keep, a whole number from 2 on"
        )

    @property
    def all(self) -> tuple[Target, ...]:
        """This target and the others, each alone."""
        return (replace(self, others=()), *self.others)

    @property
    def is_time(self) -> bool:
        """Whether the target is a latency on this device, which is predicted and not counted."""
        return self.metric in ("latency", "latency_ms")

    @property
    def counted_metric(self) -> CountedMetric:
        """What is counted and compared with the limit.

        Raises:
            TargetError: the target is a latency.
        """
        match self.metric:
            case "blocks":
                return "macs"
            case "size_mb":
                return "size_bytes"
            case "latency" | "latency_ms":
                raise TargetError(
                    f"target.{self.metric} is for methods that slice heads, dims or MLP units: "
                    "choose such a method, or target.macs"
                )
            case metric:
                return metric

    @property
    def unit(self) -> str:
        """What is counted, for messages: macs, params, units or bytes."""
        return self.counted_metric.removeprefix("size_")

    @property
    def is_identity(self) -> bool:
        """Whether nothing has to be removed."""
        unbounded = self.metric not in ("blocks", "size_mb", "latency_ms") and self.keep == 1
        return unbounded and all(other.is_identity for other in self.others)

    def limit(self, dense: int) -> int:
        """Return how much of `dense` may remain.

        Raises:
            TargetError: the target is above `dense`.
        """
        if self.metric == "size_mb":
            if self.keep * 1e6 > dense:
                raise TargetError(
                    f"target.size_mb={self.keep}: expected at most the {dense / 1e6:g} MB of the "
                    "dense network"
                )
            return math.floor(self.keep * 1e6 + 1e-6)
        if self.keep > dense:
            raise TargetError(
                f"target.{self.metric}={self.keep}: expected at most the {dense:,} {self.metric} "
                "of the dense network, or the fraction to keep"
            )
        if self.keep > 1:
            return int(self.keep)
        return math.floor(self.keep * dense + 1e-6)  # 0.7 of 10 is 7, though 0.7 is inexact


def at_strength(strength: float, levels: Sequence[float]) -> float:
    """Interpolate the six-entry table `levels` at `strength` in 0..5.

    >>> at_strength(2.5, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    0.75
    """
    below = min(int(strength), LEVELS - 2)
    share = strength - below
    return round(levels[below] * (1 - share) + levels[below + 1] * share, 12)


def resolve_target(
    strength: float | None,
    target: Mapping[str, float | int | None],
    *,
    levels: Sequence[float],
    metric: Metric,
    where: str,
    several: bool = False,
) -> Target:
    """Return the target of a run: the entries of `target` that are set, else that of `strength`.

    Args:
        strength: 0 to 5, or None where `target` has an entry.
        target: metric -> how much to keep, None where it is not set.
        levels: the fractions of `metric` kept at strengths 0 to 5; (1,) if nothing is ever removed.
        metric: what `levels` are fractions of.
        where: the file that has the levels, for messages.
        several: whether more than one target may be set.

    Raises:
        TargetError: naming the value and what is allowed.
    """
    given = {name: keep for name, keep in target.items() if keep is not None}
    if len(levels) == 1:
        if given or strength != 0:
            raise TargetError(f"{where} removes nothing: set strength=0 and no target")
        return Target(metric=metric, keep=1.0)
    _check_strength(strength, levels, where=where)
    if len(given) > 1 and not several:
        names = ", ".join(f"target.{name}" for name in given)
        raise TargetError(f"{names}: expected at most one target")
    if given:
        first, *others = (
            Target(metric=name, keep=keep)  # type: ignore[arg-type]  # Target checks it
            for name, keep in given.items()
        )
        return replace(first, others=tuple(others))
    if strength is None:
        raise TargetError("strength=null: expected a number from 0 to 5, or one target")
    return Target(metric=metric, keep=at_strength(strength, levels))


def _check_strength(strength: float | None, levels: Sequence[float], *, where: str) -> None:
    """Refuse a strength outside 0..5, and levels that do not fall from 1 to above 0."""
    if strength is not None and not (is_rate(strength) and strength <= LEVELS - 1):
        raise TargetError(
            f"strength={strength}: expected a number from 0 to {LEVELS - 1} "
            f"({where} has {LEVELS} levels)"
        )
    falling = all(a > b for a, b in pairwise(levels))
    if len(levels) != LEVELS or levels[0] != 1 or not falling or levels[-1] <= 0:
        raise TargetError(
            f"levels={list(levels)} ({where}): expected {LEVELS} fractions to keep, the first 1, "
            "each below the one before, the last above 0"
        )
