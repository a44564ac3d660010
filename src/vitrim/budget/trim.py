"""From scores and a target to a plan: the fewest removals of units that meet the target.

How far below the target a plan may end. A step is what is removed at a time:

    one unit                  by default
    `round_to` units          of a head, where the site has heads; fewer at first, where the width
                              is no multiple
    these, of every head      with `even_heads`
    a head                    where heads are scored; also where the last value dim of a head goes:
                              its query-key dims go with it

Ranked over all sites (`scope="global"`), a plan is as large as it can be: to give back any step
would exceed the target, so that it ends less than the cheapest step below it. In place of the last
head, dims of others go if the plan then ends nearer to the target. With the same fraction of every
site (`scope="site"`), only steps of the sites that lost the largest fraction are given back; the
others have lost as much to within one step, and stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from vitrim.budget.cost import Cost, TimeModel
from vitrim.budget.fill import Removal, Scale, largest, units_left
from vitrim.budget.target import Target, TargetError
from vitrim.network.structure import Site, Structure
from vitrim.network.survivors import propagate, to_edits
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
    site_rates: Mapping[str, float] | None = None,
) -> tuple[Keep, ...]:
    """Remove the least important units until `target` is met, and none after that.

    Units are ranked by score over all sites (`scope="global"`), or by rank within their own site so
    that every site loses the same fraction (`scope="site"`). Of equal scores the lower index is
    kept. Widths (of a head, where the site has heads) shrink to multiples of `round_to`. The best
    unit of a site is never removed.

    Removals of units that still fit in the end are undone, the most important ones first. How far
    below the target the plan may be is said above.

    Args:
        cost: the dense network's closed formula.
        scores: site name -> importance, higher is kept, shape (size,), finite.
        target: the plan reaches at most this.
        scope: how sites are compared.
        round_to: units removed in one step.
        even_heads: remove the same number of dims from every head of a site.
        site_rates: with `scope="site"`, the fraction that a site loses while others lose 1.

    Raises:
        TargetError: a score is not finite, or the sites cannot give up enough to meet the target.
    """
    removals = _removals(
        cost.structure, scores, scope, round_to, site_rates or {}, even_heads=even_heads
    )
    scale = _scale(cost, [*scores], target, even_heads=even_heads)

    def reached(n: int) -> int:
        return scale.amount(propagate(cost.structure, units_left(cost.structure, removals[:n])))

    lowest = reached(len(removals))
    if lowest > scale.limit:
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: this method's sites go down "
            f"to {lowest:,} of {scale.total:,} {scale.unit} ({lowest / scale.total:.4f}), not to "
            f"{scale.limit:,}"
        )
    low, high = 0, len(removals)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) <= scale.limit else (middle + 1, high)
    kept = largest(cost.structure, removals, low, scale, equal_shares=scope == "site")
    return to_edits(cost.structure, propagate(cost.structure, kept), kept)


def _scale(cost: Cost, scored: Sequence[str], target: Target, *, even_heads: bool) -> Scale:
    """Return how plans for the sites `scored` are compared with `target`."""
    if target.is_time:
        return _time_scale(cost, scored, target, even_heads=even_heads)
    metric = target.counted_metric
    return Scale(
        limit=cost.limit(target, scored),
        total=cost.total(metric, scored),
        unit=target.unit,
        amount=lambda survivors: cost.cost_of(survivors, scored).of(metric),
    )


def mean_savings(
    cost: Cost, sites: Sequence[Site], target: Target, *, even_heads: bool
) -> dict[str, float]:
    """Return what one unit of each site gives back, on average over half of them, as a fraction.

    Args:
        cost: the dense network's closed formula.
        sites: whose units may go.
        target: in whose metric savings are counted, as a fraction of the whole.
        even_heads: as `trim` has it.
    """
    described = cost.structure
    scale = _scale(cost, [site.name for site in sites], target, even_heads=even_heads)
    found = {}
    for site in sites:
        heads = units_by_head(site)
        half = [unit for head in heads for unit in head[: max(1, len(head) // 2)]]
        left = scale.amount(propagate(described, {site.name: torch.tensor(half)}))
        found[site.name] = (scale.total - left) / scale.total / max(1, site.size - len(half))
    return found


def _time_scale(cost: Cost, scored: Sequence[str], target: Target, *, even_heads: bool) -> Scale:
    """Return a scale in millionths of the dense network's latency."""
    table, fraction = time_budget(cost, scored, target, even_heads=even_heads)
    return Scale(
        limit=min(math.floor(1e6 * fraction), 10**6),
        total=10**6,
        unit="ppm of the latency",
        amount=lambda survivors: math.ceil(1e6 * table.ratio(cost.structure, survivors)),
    )


def time_budget(
    cost: Cost, scored: Sequence[str], target: Target, *, even_heads: bool, choice: str = "sites"
) -> tuple[TimeModel, float]:
    """Return what predicts latency, and the fraction of the dense network's that may remain.

    Args:
        cost: the network's closed formula.
        scored: the sites whose units may go.
        target: a latency.
        even_heads: whether all heads of an attention have one width.
        choice: what a user may choose others of, for messages.

    Raises:
        VitrimError: the latency cannot be predicted.
    """
    described = cost.structure
    if not even_heads and any(described.sites[name].head_dims for name in scored):
        raise TargetError(
            f"target.{target.metric}: the latency of heads of unequal width cannot be predicted: "
            f"set method.even_heads=true, or choose other {choice}"
        )
    if cost.latency_table is None:
        raise TargetError(f"target.{target.metric}: no latency was measured on this device")
    table = cost.latency_table()
    table.check(described, scored)
    return table, target.keep if target.metric == "latency" else target.keep / table.dense_ms


def _removals(
    described: Structure,
    scores: Mapping[str, Tensor],
    scope: Scope,
    round_to: int,
    site_rates: Mapping[str, float],
    *,
    even_heads: bool,
) -> list[Removal]:
    """Return every possible removal in order, without the last one of each site."""
    removals: list[Removal] = []
    protected_heads = _protected_heads(described, scores)
    for order, (name, score) in enumerate(scores.items()):
        site = _checked_site(described, name, score, even_heads=even_heads)
        of_site = _removals_of(site, score, order, round_to, even_heads=even_heads)
        if not of_site:
            continue  # an already cut network may have no query-key dims to remove
        protected = [
            index
            for index, removal in enumerate(of_site)
            if _is_protected(removal, site, protected_heads)
        ]
        del of_site[protected[-1] if protected else -1]
        if scope == "site":
            of_site = _by_fraction(of_site, site.size * site_rates.get(name, 1.0), order)
        removals += of_site
    return sorted(removals)


def _checked_site(described: Structure, name: str, score: Tensor, *, even_heads: bool) -> Site:
    """Return the site with that name if it can be cut by `score`.

    Raises:
        TargetError: naming the site and the reason why it cannot.
    """
    site = described.sites.get(name)
    if site is None or site.locked_reason:
        reason = "there is no such site" if site is None else site.locked_reason
        raise TargetError(f"site {name!r} cannot be cut: {reason}")
    if even_heads and len(set(site.head_dims)) > 1:
        raise TargetError(f"site {name!r}: even_heads needs heads of one width")
    if score.shape != (site.size,) or not bool(torch.isfinite(score).all()):
        raise TargetError(f"site {name!r}: expected {site.size} finite scores")
    return site


def _removals_of(
    site: Site, score: Tensor, order: int, round_to: int, *, even_heads: bool
) -> list[Removal]:
    """Return all removals of a site, the least important first; `order` is its place among all."""
    values = score.double().tolist()
    chunks = [
        [
            (_mean([values[unit] for unit in step]), step)
            for step in in_steps(head, values, round_to)
        ]
        for head in units_by_head(site)
    ]
    if even_heads:
        chunks = [[_merged(level) for level in zip(*chunks, strict=True)]]
    return sorted(
        Removal((value, -max(units) / site.size, order), site.name, units, head)
        for head, of_head in enumerate(chunks)
        for value, units in of_head
    )


def _by_fraction(removals: Sequence[Removal], size: float, order: int) -> list[Removal]:
    """Return the removals of a site with keys that rise with the fraction of `size` removed."""
    fractions = list(accumulate(len(removal.units) / size for removal in removals))
    return [
        removal._replace(key=(fraction, order, rank))
        for rank, (fraction, removal) in enumerate(zip(fractions, removals, strict=True))
    ]


def _protected_heads(described: Structure, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the best head of attentions whose heads are scored, by the sites of their dims."""
    return {
        dims: int(scores[attention.heads].argmax())
        for attention in described.attentions
        for dims in (attention.qk, attention.v)
        if attention.heads in scores
    }


def _is_protected(removal: Removal, site: Site, protected_heads: Mapping[str, int]) -> bool:
    """Whether the removal takes units that the last head of the site needs."""
    if site.name not in protected_heads:
        return True
    head = units_by_head(site)[protected_heads[site.name]]
    return any(unit in head for unit in removal.units)


def units_by_head(site: Site) -> list[range]:
    """Return the units of each head, or all units together where the site has no heads."""
    ends = list(accumulate(site.head_dims or (site.size,), initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


def in_steps(units: Sequence[int], values: Sequence[float], round_to: int) -> Iterator[list[int]]:
    """Group units, least important first, so that a multiple of `round_to` is always kept.

    Args:
        units: of one head, or of a site without heads.
        values: the importance of every unit of the site.
        round_to: units removed in one step.
    """
    ranked = sorted(units, key=lambda unit: (values[unit], -unit))
    first = len(ranked) % round_to or round_to
    for start, stop in pairwise([0, *range(first, len(ranked) + 1, round_to)]):
        yield ranked[start:stop]


def _mean(values: Sequence[float]) -> float:
    """Return the mean; of equal numbers it is exactly that number, so that ties stay ties."""
    return values[0] + math.fsum(value - values[0] for value in values) / len(values)


def _merged(level: Sequence[tuple[float, list[int]]]) -> tuple[float, list[int]]:
    """Return one removal that takes the same number of units from every head."""
    units = [unit for _, chunk in level for unit in chunk]
    return _mean([value for value, _ in level]), units
