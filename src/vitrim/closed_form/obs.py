"""Optimal brain surgeon (Hassibi and Stork 1993) in greedy order, for single units and for groups.

With C the covariance of units and W_j the weights that read unit j, removing the unit costs
||W_j||^2 / [C^-1]_jj of squared output error once the kept units have compensated for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitrim.network.computing import on_device

_POOL, _ROUND = 512, 128  # candidates of the greedy order, and the most removed in one round
_EXACT = 1536  # up to this many units, the greedy order is computed in float64


@on_device
def obs_greedy(
    cov: Tensor, outgoing: Tensor, *, ridge: float, n_removed: int | None = None
) -> Tensor:
    """Return scores that rise in the order of greedy removal: the costs, made monotone.

    Removing unit j costs ||W_j||^2 / [C^-1]_jj; then W and C^-1 are updated as if the kept units
    had compensated for it. Equal units are removed one at a time, the higher index first.

    The exact updates of a round are done for the cheapest 512 units; the other units receive them
    together at the end of the round. A round ends when a unit outside the pool may be the next. As
    costs nearly always rise, the order is that of removal one by one: exactly so on the blocks of
    ViT-Ti that we compared. At the size of DeiT-B (3072 units, half of them removed, one thread) it
    is 5.8 times faster than rank-one updates of the whole matrices. Rounds are computed on the CPU,
    as they read a number for every unit; what happens between them, on the device.

    Args:
        cov: covariance of the units, (M, M).
        outgoing: W, the weights that read the units, (M, D).
        ridge: added to the diagonal of C, relative to its mean.
        n_removed: how many units will be removed; the rest is ranked by the cost of each one's
            removal at that point. None: all.
    """
    dtype = torch.float64 if len(cov) <= _EXACT else torch.float32
    inverse = regularised_inverse(cov.to(dtype), ridge)  # only the upper triangle is updated
    weights = outgoing.to(dtype, copy=True).contiguous()
    units = torch.arange(len(cov), device=cov.device)
    live = torch.ones(len(cov), dtype=torch.bool, device=cov.device)
    n_removed = len(cov) if n_removed is None else min(n_removed, len(cov))
    order: list[int] = []
    costs: list[float] = []
    while True:
        cost = weights.square().sum(1) / inverse.diagonal()
        cost[~live] = torch.inf
        ranked = len(cost) - 1 - cost.flip(0).argsort(stable=True)[: len(cov) - len(order)]
        if len(order) >= n_removed:
            return _rising(order + units[ranked].tolist(), costs + cost[ranked].tolist())
        pool, outside = ranked[:_POOL].sort(descending=True).values, ranked[_POOL : _POOL + 1]
        least = float(cost[outside]) if len(outside) else torch.inf
        candidates = inverse.index_select(0, pool).index_select(1, pool)
        # the pool is descending, so the lower triangle is the valid one
        candidates = candidates.tril() + candidates.tril(-1).mT
        limit = min(_ROUND, n_removed - len(order))
        picks, round_costs = _round(candidates, weights[pool], least, limit)
        removed = pool[torch.tensor(picks).to(pool.device)]
        order += units[removed].tolist()
        costs += round_costs
        rows = _rows(inverse, removed)
        coefficients = torch.linalg.inv(rows.index_select(1, removed).double()).to(dtype) @ rows
        weights.addmm_(coefficients.mT, weights[removed], alpha=-1)
        _subtract(inverse, rows.mT, coefficients)
        live[removed] = False
        inverse.diagonal()[~live] = 1.0  # removed units: any finite number
        if int(live.sum()) < 0.8 * len(live):
            kept = live.nonzero()[:, 0]
            inverse = inverse.index_select(0, kept).index_select(1, kept)
            weights, units, live = weights[kept], units[kept], live[kept]


def obs_greedy_groups(
    cov: Tensor, outgoing: Tensor, groups: Sequence[Tensor], *, ridge: float
) -> Tensor:
    """Return scores that rise in the order of greedy removal of whole groups, shape (groups,).

    Losses are read group by group, so that all but the first inverse is computed on the CPU.
    """
    inverse, weights = regularised_inverse(cov, ridge), outgoing.clone()
    remaining = list(range(len(groups)))
    order: list[int] = []
    costs: list[float] = []
    while remaining:
        losses = {
            group: float(obs_loss(inverse, weights, groups[group])) for group in reversed(remaining)
        }
        cheapest = min(losses, key=losses.__getitem__)
        remaining.remove(cheapest)
        order.append(cheapest)
        costs.append(losses[cheapest])
        removed = groups[cheapest]
        coefficients = torch.linalg.solve(inverse[removed][:, removed], inverse[removed])
        weights = weights - coefficients.T @ weights[removed]
        inverse = inverse - inverse[:, removed] @ coefficients
        rest = torch.cat([groups[group] for group in remaining]) if remaining else removed
        keep = torch.zeros(len(cov), dtype=torch.bool)
        keep[rest] = True
        inverse[~keep], inverse[:, ~keep] = 0.0, 0.0
        inverse.diagonal()[~keep] = 1.0
    return _rising(order, costs)


def obs_loss(inverse: Tensor, outgoing: Tensor, group: Tensor) -> Tensor:
    """Return the squared output error of removing a group that the other units compensate for."""
    within = inverse[group][:, group]
    solved: Tensor = torch.linalg.solve(within, outgoing[group])
    return (solved * outgoing[group]).sum()


@on_device
def regularised_inverse(cov: Tensor, ridge: float) -> Tensor:
    """Return the inverse of C with `ridge` of its mean diagonal added; of I where C is zero.

    Where float32 fails, the inverse is computed in float64.
    """
    mean = float(cov.diagonal().mean())
    inverse = cov.clone()
    inverse.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    _invert(inverse)
    if inverse.dtype == torch.float64 or bool((inverse.diagonal() > 0).all()):
        return inverse
    return regularised_inverse(cov.double(), ridge).to(cov.dtype)


def _invert(matrix: Tensor) -> None:
    """Invert a positive definite matrix in place, recursively by halves, with matrix products.

    Only the upper triangle is read, so that rounding errors in the lower one cannot grow. At 3072
    units 1.7 times faster than torch.cholesky_inverse (one thread).
    """
    size = len(matrix)
    if size <= 128:
        matrix.copy_(torch.linalg.inv(matrix.triu() + matrix.triu(1).mT))
        return
    half = size // 2
    first, across, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _invert(first)
    product = first @ across
    _subtract(last, across.mT, product)
    _invert(last)
    corner = product @ last
    first.addmm_(corner, product.mT)
    matrix[:half, half:] = -corner
    matrix[half:, :half] = -corner.mT


def _subtract(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract a symmetric product from the upper triangle of `matrix`, and ignore the lower."""
    step = max(128, -(-len(matrix) // 8))
    for start in range(0, len(matrix), step):
        matrix[start : start + step, start:].addmm_(
            left[start : start + step], right[:, start:], alpha=-1
        )


def _rows(upper: Tensor, index: Tensor) -> Tensor:
    """Return rows of the symmetric matrix with that upper triangle."""
    right = torch.arange(len(upper), device=upper.device) >= index[:, None]
    return torch.where(right, upper.index_select(0, index), upper.index_select(1, index).mT)


def _round(
    inverse: Tensor, weights: Tensor, least: float, limit: int
) -> tuple[list[int], list[float]]:
    """Remove up to `limit` of the pool's units one by one; return them and their costs.

    The round ends where the next unit would cost more than `least`, the cheapest unit outside. Only
    the diagonals of the two matrices (inverse, and products of weights) are updated; a row is
    computed when its unit is removed, as in a pivoted Cholesky decomposition.
    """
    a = inverse.cpu().double().numpy()
    p = (weights @ weights.T).cpu().double().numpy()
    limit = min(limit, len(a))
    a_rows, takes, gains = (np.empty((limit, len(a))) for _ in range(3))
    a_diagonal, p_diagonal, dead = a.diagonal().copy(), p.diagonal().copy(), np.zeros(len(a))
    picks: list[int] = []
    costs: list[float] = []
    for step in range(limit):
        cost = p_diagonal / a_diagonal.clip(1e-300) + dead
        pick = int(cost.argmin())
        if picks and cost[pick] > least:
            break
        picks.append(pick)
        costs.append(float(cost[pick]))
        dead[pick] = np.inf
        a_row = a[pick] - takes[:step, pick] @ a_rows[:step]
        p_row = p[pick] - takes[:step, pick] @ gains[:step] - gains[:step, pick] @ takes[:step]
        take = a_row / a_row[pick]
        gain = p_row - 0.5 * p_row[pick] * take  # p - t g^T - g t^T, t = take, g = gain
        a_rows[step], takes[step], gains[step] = a_row, take, gain
        a_diagonal -= take * a_row
        p_diagonal -= 2.0 * take * gain
    return picks, costs


def _rising(order: Sequence[int], costs: Sequence[float]) -> Tensor:
    """Return the costs by unit, each at least a little above that of the unit before in `order`."""
    steps = torch.tensor(costs, dtype=torch.float64).clamp_min(0.0)
    highest = steps.cummax(0).values
    floor = float(highest[-1]) * 1e-12 + 1e-300
    rising = highest + floor * torch.arange(1, len(order) + 1, dtype=torch.float64)
    return torch.empty_like(rising).index_copy_(0, torch.tensor(order), rising)
