"""Which layers are factorised, and at which rank: from loss curves and a limit, without a network.

Every allocation ends by raising ranks one by one where that helps most, until nothing fits any
more.

    uniform   the same fraction of every layer's weights
    greedy    from full ranks down, the component that loses least per weight saved is removed; a
              layer whose rank saves nothing in the end stays dense. With a `max_rank_fraction` of
              1 that is the mixed-rank paper's (arXiv 2402.06004), as far as it is known; with our
              default of 0.7, a layer also stays dense at ranks that save a little
    hull      ours: the same along the lower convex hull of each layer's error over its cost, which
              accounts for a layer's first components saving nothing and a dense layer having no
              error
    nested    ours: along the same hull, and no rank ends above the highest one, so that a larger
              limit never has a larger error
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

Allocation = Literal["uniform", "greedy", "hull", "nested"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


class Curve(NamedTuple):
    """One layer: what its components are worth, and what they cost.

    `energy` holds the error that removing each component causes, in the order in which components
    are used; `step` is the cost of one rank, `dense` that of the dense layer, in the target's unit.
    """

    energy: Sequence[float]
    step: int
    dense: int

    @property
    def break_even(self) -> int:
        """The highest rank that costs less than the dense layer."""
        return max(0, min(len(self.energy), (self.dense - 1) // self.step))


def least(curves: Mapping[str, Curve], max_rank_fraction: float) -> int:
    """Return the lowest cost of all layers: rank 1 wherever that saves something."""
    max_ranks = _max_ranks(curves, max_rank_fraction)
    return sum(min(c.step, c.dense) if max_ranks[name] else c.dense for name, c in curves.items())


def allocate(
    curves: Mapping[str, Curve],
    limit: int,
    *,
    how: Allocation,
    max_rank_fraction: float,
    error_exponent: float = 1.0,
) -> dict[str, int]:
    """Return the rank of every layer that is factorised; the others stay dense.

    The layers together cost at most `limit`, and the difference is below the cost of one more rank
    of any factorised layer that could have one (`nested`: that is below its highest rank).

    Args:
        curves: of the layers, by name.
        limit: on the cost of all of them, at least `least(curves, max_rank_fraction)`.
        how: see above.
        max_rank_fraction: highest rank of a factorised layer, as a fraction of its break-even rank;
            above about 0.7 two small products are no faster than one large one. What the limit then
            still allows makes layers dense again; only the rest of it goes to higher ranks.
        error_exponent: with `hull` and `nested`, the exponent of each layer's error in the sum:
            above 1, errors are spread over more layers, because those of one layer do not simply
            add up.
    """
    if sum(curve.dense for curve in curves.values()) <= limit:
        return {}
    max_ranks = _max_ranks(curves, max_rank_fraction)
    match how:
        case "uniform":
            ranks = _uniform(curves, max_ranks, limit)
            curves = {name: curve._replace(energy=_even(curve)) for name, curve in curves.items()}
        case "greedy":
            ranks = _greedy(curves, max_ranks, limit)
            curves = {name: curve._replace(energy=_own(curve)) for name, curve in curves.items()}
        case "hull":
            ranks = _hull(curves, max_ranks, limit, error_exponent)
        case "nested":
            ranks = _hull(curves, max_ranks, limit, error_exponent)
            _fill(curves, max_ranks, ranks, limit)
            if all(rank >= max_ranks[name] for name, rank in ranks.items()):
                _restore(curves, ranks, limit)
            return ranks
    for highest in (max_ranks, _max_ranks(curves, 1.0)):
        _fill(curves, highest, ranks, limit)
        _restore(curves, ranks, limit)
        _fill(curves, highest, ranks, limit)
    return ranks


def _even(curve: Curve) -> list[float]:
    """Return energies by which the layer with the smallest fraction of its weights comes first."""
    return [curve.dense / (index + 1) for index in range(len(curve.energy))]


def _own(curve: Curve) -> list[float]:
    """Return energies as fractions of the layer's total."""
    total = math.fsum(curve.energy) or 1.0
    return [energy / total for energy in curve.energy]


def _max_ranks(curves: Mapping[str, Curve], max_rank_fraction: float) -> dict[str, int]:
    return {
        name: math.floor(max_rank_fraction * curve.break_even) for name, curve in curves.items()
    }


def _total(curves: Mapping[str, Curve], ranks: Mapping[str, int]) -> int:
    return sum(c.step * ranks[name] if name in ranks else c.dense for name, c in curves.items())


def _uniform(
    curves: Mapping[str, Curve], max_ranks: Mapping[str, int], limit: int
) -> dict[str, int]:
    def ranks_at(fraction: float) -> dict[str, int]:
        return {
            name: max(1, min(max_ranks[name], math.floor(fraction * curve.dense / curve.step)))
            for name, curve in curves.items()
            if max_ranks[name]
        }

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = _total(curves, ranks_at(middle)) <= limit
        low, high = (middle, high) if fits else (low, middle)
    return ranks_at(low)


def _greedy(
    curves: Mapping[str, Curve], max_ranks: Mapping[str, int], limit: int
) -> dict[str, int]:
    removals = sorted(
        (energy / curve.step, -index, name)
        for name, curve in curves.items()
        if max_ranks[name]
        for index, energy in enumerate(_own(curve)[1:])
    )
    ranks = {name: len(curve.energy) for name, curve in curves.items()}
    excess = sum(curve.dense for curve in curves.values()) - limit
    for _, _, name in removals:
        if excess <= 0:
            break
        curve = curves[name]
        ranks[name] -= 1
        if ranks[name] == max_ranks[name]:
            excess -= curve.dense - curve.step * ranks[name]
        elif ranks[name] < max_ranks[name]:
            excess -= curve.step
    return {
        name: rank for name, rank in ranks.items() if max_ranks[name] and rank <= max_ranks[name]
    }


def _hull(
    curves: Mapping[str, Curve], max_ranks: Mapping[str, int], limit: int, error_exponent: float
) -> dict[str, int]:
    moves = sorted(
        (slope, -corner, name)
        for name, curve in curves.items()
        if max_ranks[name]
        for slope, corner in _corners(curve, max_ranks[name], error_exponent)
    )
    ranks: dict[str, int] = {}
    total = _total(curves, ranks)
    for _, negative_rank, name in moves:
        if total <= limit:
            break
        curve, rank = curves[name], -negative_rank
        total += curve.step * rank - (curve.step * ranks[name] if name in ranks else curve.dense)
        ranks[name] = rank
    return ranks


def _corners(curve: Curve, max_rank: int, error_exponent: float) -> Iterator[tuple[float, int]]:
    """Iterate over the hull's corners below the dense layer: error per cost saved, and the rank."""
    tails = [0.0]
    for energy in reversed(curve.energy):
        tails.append(tails[-1] + max(energy, 0.0))
    errors = [tail**error_exponent for tail in reversed(tails)]  # errors[r]: of rank r
    points = [(curve.dense, 0.0, len(curve.energy))]
    points += [(curve.step * rank, errors[rank], rank) for rank in range(max_rank, 0, -1)]
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
    """Make layers dense again, in place, if they fit: those first that gain most per cost."""
    room = limit - _total(curves, ranks)

    def gain(name: str) -> float:
        curve, rank = curves[name], ranks[name]
        return math.fsum(curve.energy[rank:]) / (curve.dense - curve.step * rank)

    for name in sorted(ranks, key=lambda name: (-gain(name), name)):
        extra = curves[name].dense - curves[name].step * ranks[name]
        if extra <= room:
            room -= extra
            del ranks[name]


def _fill(
    curves: Mapping[str, Curve], max_ranks: Mapping[str, int], ranks: dict[str, int], limit: int
) -> None:
    """Raise ranks, in place, where one more gains most per cost, as long as the limit allows."""
    room = limit - _total(curves, ranks)
    queue = [(-_gain_of_next(curves[name], rank), name) for name, rank in ranks.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if ranks[name] >= max_ranks[name] or curves[name].step > room:
            continue
        ranks[name] += 1
        room -= curves[name].step
        heapq.heappush(queue, (-_gain_of_next(curves[name], ranks[name]), name))


def _gain_of_next(curve: Curve, rank: int) -> float:
    return curve.energy[rank] / curve.step if rank < len(curve.energy) else 0.0
