"""Which layers are factorised, and at which rank: error curves and a budget, and no network.

Every allocation ends with ranks one by one where they help most, until nothing fits any more.

    uniform   the same share of every layer's weights
    greedy    from full ranks down, the component that loses least per weight saved goes; a layer
              whose rank saves nothing in the end stays dense (mixed-rank paper, arXiv 2402.06004)
    hull      ours: the same along the lower convex hull of each layer's error over its cost, which
              sees that a layer's first component saves nothing and that a dense layer errs nothing
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

Allocation = Literal["uniform", "greedy", "hull"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


class Curve(NamedTuple):
    """One layer: what its components are worth, and what they cost.

    `energy` holds the error that leaving out each component causes, in the order in which they are
    taken; `step` what one rank costs, `dense` what the layer costs undivided, in the budget's unit.
    """

    energy: Sequence[float]
    step: int
    dense: int

    @property
    def break_even(self) -> int:
        """The highest rank that costs less than the layer undivided."""
        return max(0, min(len(self.energy), (self.dense - 1) // self.step))


def least(curves: Mapping[str, Curve], max_share: float) -> int:
    """Return what the layers cost at the lowest: rank 1 wherever that saves something."""
    most = _most(curves, max_share)
    return sum(min(c.step, c.dense) if most[name] else c.dense for name, c in curves.items())


def allocate(
    curves: Mapping[str, Curve],
    limit: int,
    *,
    how: Allocation,
    max_share: float,
    spread: float = 1.0,
) -> dict[str, int]:
    """Return the rank of every layer that is factorised, the others stay dense.

    What the layers cost together is at most `limit`, and less than one rank's cost of one of those
    that are factorised below it.

    Args:
        curves: of the layers, by name.
        limit: what all of them may cost together, at least `least(curves, max_share)`.
        how: see above.
        max_share: highest rank that a factorised layer may have, as a share of its break-even rank;
            two small products are no faster than one large above about 0.7. What is left of the
            budget in the end makes layers dense again, and only the rest of it goes above.
        spread: with `hull`, the exponent of each layer's error in the sum: above 1, errors are kept
            from piling up in few layers, where their effects no longer add up.
    """
    if sum(curve.dense for curve in curves.values()) <= limit:
        return {}
    most = _most(curves, max_share)
    match how:
        case "uniform":
            ranks = _uniform(curves, most, limit)
            curves = {name: curve._replace(energy=_even(curve)) for name, curve in curves.items()}
        case "greedy":
            ranks = _greedy(curves, most, limit)
            curves = {name: curve._replace(energy=_own(curve)) for name, curve in curves.items()}
        case _:
            ranks = _hull(curves, most, limit, spread)
    for highest in (most, _most(curves, 1.0)):
        _fill(curves, highest, ranks, limit)
        _restore(curves, ranks, limit)
        _fill(curves, highest, ranks, limit)
    return ranks


def _even(curve: Curve) -> list[float]:
    """Return energies by which the layer with the smallest share of its weights comes first."""
    return [curve.dense / (place + 1) for place in range(len(curve.energy))]


def _own(curve: Curve) -> list[float]:
    """Return energies as shares of the layer's own."""
    total = math.fsum(curve.energy) or 1.0
    return [energy / total for energy in curve.energy]


def _most(curves: Mapping[str, Curve], max_share: float) -> dict[str, int]:
    return {name: math.floor(max_share * curve.break_even) for name, curve in curves.items()}


def _total(curves: Mapping[str, Curve], ranks: Mapping[str, int]) -> int:
    return sum(c.step * ranks[name] if name in ranks else c.dense for name, c in curves.items())


def _uniform(curves: Mapping[str, Curve], most: Mapping[str, int], limit: int) -> dict[str, int]:
    def at(share: float) -> dict[str, int]:
        return {
            name: max(1, min(most[name], math.floor(share * curve.dense / curve.step)))
            for name, curve in curves.items()
            if most[name]
        }

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(curves, at(middle)) <= limit else (low, middle)
    return at(low)


def _greedy(curves: Mapping[str, Curve], most: Mapping[str, int], limit: int) -> dict[str, int]:
    steps = sorted(
        (energy / curve.step, -place, name)
        for name, curve in curves.items()
        if most[name]
        for place, energy in enumerate(_own(curve)[1:])
    )
    left = {name: len(curve.energy) for name, curve in curves.items()}
    over = sum(curve.dense for curve in curves.values()) - limit
    for _, _, name in steps:
        if over <= 0:
            break
        curve = curves[name]
        left[name] -= 1
        if left[name] == most[name]:
            over -= curve.dense - curve.step * left[name]
        elif left[name] < most[name]:
            over -= curve.step
    return {name: rank for name, rank in left.items() if most[name] and rank <= most[name]}


def _hull(
    curves: Mapping[str, Curve], most: Mapping[str, int], limit: int, spread: float
) -> dict[str, int]:
    moves = sorted(
        (slope, -corner, name)
        for name, curve in curves.items()
        if most[name]
        for slope, corner in _corners(curve, most[name], spread)
    )
    ranks: dict[str, int] = {}
    total = _total(curves, ranks)
    for _, corner, name in moves:
        if total <= limit:
            break
        curve = curves[name]
        total += curve.step * (-corner) - (
            curve.step * ranks[name] if name in ranks else curve.dense
        )
        ranks[name] = -corner
    return ranks


def _corners(curve: Curve, most: int, spread: float) -> Iterator[tuple[float, int]]:
    """Return the hull's corners below the dense layer: error per cost saved, and the rank there."""
    tails = [0.0]
    for energy in reversed(curve.energy):
        tails.append(tails[-1] + max(energy, 0.0))
    errors = [tail**spread for tail in reversed(tails)]  # errors[r]: of rank r
    points = [(curve.dense, 0.0, len(curve.energy))]
    points += [(curve.step * rank, errors[rank], rank) for rank in range(most, 0, -1)]
    hull: list[tuple[int, float, int]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    for before, after in pairwise(hull):
        yield _slope(before, after), after[2]


def _slope(a: tuple[int, float, int], b: tuple[int, float, int]) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])


def _restore(curves: Mapping[str, Curve], ranks: dict[str, int], limit: int) -> None:
    """Make layers dense again, in place, those first where that mends most per cost, if it fits."""
    room = limit - _total(curves, ranks)

    def worth(name: str) -> float:
        curve, rank = curves[name], ranks[name]
        return math.fsum(curve.energy[rank:]) / (curve.dense - curve.step * rank)

    for name in sorted(ranks, key=lambda name: (-worth(name), name)):
        extra = curves[name].dense - curves[name].step * ranks[name]
        if extra <= room:
            room -= extra
            del ranks[name]


def _fill(
    curves: Mapping[str, Curve], most: Mapping[str, int], ranks: dict[str, int], limit: int
) -> None:
    """Raise ranks, in place, where one more mends most per cost, while it fits the budget."""
    room = limit - _total(curves, ranks)
    queue = [(-_next(curves[name], rank), name) for name, rank in ranks.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if ranks[name] >= most[name] or curves[name].step > room:
            continue
        ranks[name] += 1
        room -= curves[name].step
        heapq.heappush(queue, (-_next(curves[name], ranks[name]), name))


def _next(curve: Curve, rank: int) -> float:
    return curve.energy[rank] / curve.step if rank < len(curve.energy) else 0.0
