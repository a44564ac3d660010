"""Targets: what may remain, by a strength and its table, or by a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from vitrim.errors import VitrimError, is_rate

Metric = Literal["macs", "params", "units", "blocks", "latency", "latency_ms"]


METRICS: tuple[Metric, ...] = ("macs", "params", "units", "blocks", "latency", "latency_ms")


LEVELS = 6


"""Entries in a method's strength table: strengths 0, 1, 2, 3, 4 and 5."""


class TargetError(VitrimError):
    """A budget that is no number in range, or that no plan can reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Keep at most `keep` of `metric`: a fraction in (0, 1], or a whole number of 2 and more.

    With metric blocks, `keep` counts what goes: at most the MACs remain that are left when so many
    of the network's blocks, of mean size, are removed; 1.5 is one and a half. With latency it is a
    share of the dense network's time, with latency_ms that time in milliseconds.
    """

    metric: Metric
    keep: float | int

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
            share = self.metric == "latency"
            if not is_rate(self.keep) or self.keep == 0 or (share and self.keep > 1):
                raise TargetError(
                    f"target.{self.metric}={self.keep}: expected "
                    f"{'a share up to 1' if share else 'milliseconds'}, above 0"
                )
            return
        whole = is_rate(self.keep) and self.keep >= 2 and self.keep == int(self.keep)
        if whole or (is_rate(self.keep) and 0 < self.keep <= 1):
            return
        raise TargetError(
            f"target.{self.metric}={self.keep}: expected the fraction to keep, above 0 and at most "
            f"1, or the number of {self.metric} to keep, a whole number from 2 on"
        )

    @property
    def is_time(self) -> bool:
        """Whether the budget is a time on this device, which no count can be compared with."""
        return self.metric in ("latency", "latency_ms")

    @property
    def unit(self) -> Literal["macs", "params", "units"]:
        """What is counted to compare with `limit`.

        Raises:
            TargetError: it is a time.
        """
        match self.metric:
            case "blocks":
                return "macs"
            case "latency" | "latency_ms":
                raise TargetError(
                    f"target.{self.metric} is for methods that slice (oneshot, vtp, fskd, cd): "
                    "choose one of them, or target.macs"
                )
            case metric:
                return metric

    @property
    def is_identity(self) -> bool:
        """Whether everything may remain."""
        return self.metric not in ("blocks", "latency_ms") and self.keep == 1

    def limit(self, dense: int) -> int:
        """Return the most that may remain of `dense`.

        Raises:
            TargetError: more is asked for than there is.
        """
        if self.keep > dense:
            raise TargetError(
                f"target.{self.metric}={self.keep}: expected at most the {dense:,} {self.metric} "
                "there are, or the fraction to keep"
            )
        if self.keep > 1:
            return int(self.keep)
        return math.floor(self.keep * dense + 1e-6)  # 0.7 of 10 is 7, whatever 0.7 is in binary


def at_strength(strength: float, levels: Sequence[float]) -> float:
    """Interpolate the six-entry table `levels` at `strength` in 0..5.

    >>> at_strength(2.5, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    0.75
    """
    below = min(int(strength), LEVELS - 2)
    share = strength - below
    return round(levels[below] * (1 - share) + levels[below + 1] * share, 12)


def check_strength(strength: Any, levels: Sequence[float], *, where: str) -> None:
    """Refuse a strength outside 0..5, and a table that is not 1 falling to above 0.

    None stands for no strength, which `choose` accepts beside a target.

    Raises:
        TargetError: naming the value and what is allowed.
    """
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


def choose(
    strength: float | None, levels: Sequence[float], target: Mapping[str, Any], *, metric: Metric
) -> Target:
    """Return the budget: the one entry of `target` that is set, else `metric` by strength table."""
    given = {name: keep for name, keep in target.items() if keep is not None}
    if len(given) > 1:
        names = ", ".join(f"target.{name}" for name in given)
        raise TargetError(f"{names}: expected at most one target")
    for name, keep in given.items():
        return Target(metric=name, keep=keep)  # type: ignore[arg-type]  # checked there
    if strength is None:
        raise TargetError("strength=null: expected a number from 0 to 5, or one target")
    return Target(metric=metric, keep=at_strength(strength, levels))
