"""From scores and a budget to a plan: the closed formula for costs, the largest plan in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.network.structure import Site, Structure
from vitrim.network.survivors import (
    Survivors,
    as_keeps,
    settle,
)
from vitrim.plan import Keep

Scope = Literal["global", "site"]


def trim(
    cost: Cost,
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    scope: Scope = "global",
    round_to: int = 1,
    even_heads: bool = False,
    pace: Mapping[str, float] | None = None,
) -> tuple[Keep, ...]:
    """Remove the least important units until `target` is met, and not one more.

    Units are ranked by score over all sites (`scope="global"`), or by rank within their own site so
    that every site loses the same share (`scope="site"`). Ties go to the lower index. Widths (of a
    head, where the site has heads) shrink to multiples of `round_to`. The best unit of a site
    stays.

    Args:
        cost: the dense network's closed formula.
        scores: site name -> importance, higher is kept, shape (size,), finite.
        target: the budget; what is reached is at most it, and less than one step's cost below it.
        scope: how sites are compared.
        round_to: units removed in one step.
        even_heads: take as many dims from every head of a site, so that its heads stay equal.
        pace: site name -> how much of a share it loses, with `scope="site"`, while others lose 1.

    Raises:
        TargetError: a score is not finite, or the budget is below what the sites can give up.
    """
    steps = _steps(cost.structure, scores, scope, round_to, pace or {}, even_heads=even_heads)
    limit, most, left = _scale(cost, [*scores], target, even_heads=even_heads)

    def reached(n: int) -> int:
        return left(settle(cost.structure, _kept(cost.structure, steps, n)))

    least = reached(len(steps))
    if least > limit:
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: this method's sites go down "
            f"to {least:,} of {most:,} {'ppm of the time' if target.is_time else target.unit} "
            f"({least / most:.4f}), not to {limit:,}"
        )
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) <= limit else (middle + 1, high)
    kept = _kept(cost.structure, steps, low)
    return as_keeps(cost.structure, settle(cost.structure, kept), kept)


def _scale(
    cost: Cost, scored: Sequence[str], target: Target, *, even_heads: bool
) -> tuple[int, int, Callable[[Survivors], int]]:
    """Return the limit, what the dense network has, and what is left of it by what survives.

    Times are in millionths of the dense network's.
    """
    if not target.is_time:
        unit = target.unit
        return (
            cost.allowed(target, scored),
            cost.whole(unit, scored),
            lambda left: int(getattr(cost.of(left, scored), unit)),
        )
    described = cost.structure
    if not even_heads and any(described.sites[name].head_dims for name in scored):
        raise TargetError(
            f"target.{target.metric}: heads of unequal width take longer than can be foretold: set "
            "method.even_heads=true, or choose other sites"
        )
    if cost.timing is None:
        raise TargetError(f"target.{target.metric}: nothing was measured on this device")
    timing = cost.timing()
    timing.check(described, scored)
    share = target.keep if target.metric == "latency" else target.keep / timing.dense_ms
    limit = min(math.floor(1e6 * share), 10**6)
    return limit, 10**6, lambda left: math.ceil(1e6 * timing.ratio(described, left))


class _Step(NamedTuple):
    key: tuple[float, ...]
    site: str
    units: list[int]


def _steps(
    described: Structure,
    scores: Mapping[str, Tensor],
    scope: Scope,
    round_to: int,
    pace: Mapping[str, float],
    *,
    even_heads: bool,
) -> list[_Step]:
    """Return every removal that may happen, in order, the last one of each site excepted."""
    steps: list[_Step] = []
    anchors = _anchors(described, scores)
    for order, (name, score) in enumerate(scores.items()):
        site = described.sites.get(name)
        if site is None or site.locked:
            reason = "there is no such site" if site is None else site.locked
            raise TargetError(f"site {name!r} cannot be cut: {reason}")
        if even_heads and len(set(site.head_dims)) > 1:
            raise TargetError(f"site {name!r}: even_heads needs heads of one width")
        if score.shape != (site.size,) or not bool(torch.isfinite(score).all()):
            raise TargetError(f"site {name!r}: expected {site.size} finite scores")
        values = score.double().tolist()
        chunks = [list(_chunks(head, values, round_to)) for head in _heads(site)]
        if even_heads:
            chunks = [[_joined(level) for level in zip(*chunks, strict=True)]]
        found = sorted(
            _Step((value, -max(units) / site.size, order), name, units)
            for head in chunks
            for value, units in head
        )
        if not found:
            continue  # an already cut network may have no query-key dims left to give
        held = [at for at, step in enumerate(found) if _is_anchored(step, site, anchors)]
        del found[held[-1] if held else -1]
        if scope == "site":
            whole = site.size * pace.get(name, 1.0)
            gone = list(accumulate(len(step.units) / whole for step in found))
            found = [
                step._replace(key=(share, order, rank))
                for rank, (share, step) in enumerate(zip(gone, found, strict=True))
            ]
        steps += found
    return sorted(steps)


def _anchors(described: Structure, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, for the dims of attentions whose heads are scored too, the best head: it stays."""
    return {
        dims: int(scores[attention.heads].argmax())
        for attention in described.attentions
        for dims in (attention.qk, attention.v)
        if attention.heads in scores
    }


def _is_anchored(step: _Step, site: Site, anchors: Mapping[str, int]) -> bool:
    """Whether the step takes units that the last head to stay could not do without."""
    if site.name not in anchors:
        return True
    anchor = _heads(site)[anchors[site.name]]
    return any(unit in anchor for unit in step.units)


def _heads(site: Site) -> list[range]:
    """Return the units of each head, or all units together where the site has no heads."""
    ends = list(accumulate(site.head_dims or (site.size,), initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


def _chunks(
    units: Sequence[int], values: Sequence[float], round_to: int
) -> Iterator[tuple[float, list[int]]]:
    """Group units, worst first, so that whatever remains is a multiple of `round_to`."""
    ranked = sorted(units, key=lambda unit: (values[unit], -unit))
    first = len(ranked) % round_to or round_to
    for start, stop in pairwise([0, *range(first, len(ranked) + 1, round_to)]):
        chunk = ranked[start:stop]
        yield _mean([values[unit] for unit in chunk]), chunk


def _mean(values: Sequence[float]) -> float:
    """Return the mean, which of equal numbers is that very number: ties hang on it."""
    return values[0] + math.fsum(value - values[0] for value in values) / len(values)


def _joined(level: Sequence[tuple[float, list[int]]]) -> tuple[float, list[int]]:
    """Return one step that takes the same number of units from every head."""
    units = [unit for _, chunk in level for unit in chunk]
    return _mean([value for value, _ in level]), units


def _kept(structure: Structure, steps: Sequence[_Step], n: int) -> dict[str, Tensor]:
    """Return what the first `n` steps leave at every site that they touch."""
    gone: dict[str, list[int]] = {}
    for step in steps[:n]:
        gone.setdefault(step.site, []).extend(step.units)
    kept = {}
    for name, units in gone.items():
        stays = torch.ones(structure.sites[name].size, dtype=torch.bool)
        stays[units] = False
        kept[name] = stays.nonzero()[:, 0]
    return kept
