"""How much each unit of a site matters: from its weights, and from moments of its activations.

For a unit j of a site, W_j is the column of the Linear that reads it, C the covariance of all units
there, and P, K stand for the units removed and kept:

    random           a draw
    magnitude        sum |w| over the weights that make the unit
    group_l2         sqrt(sum w^2) over all weights that go with it
    taylor           E |sum_tokens x_j dL/dx_j|, first order (Molchanov et al., arXiv 1906.10771)
    variance         C_jj (VBP, Variance-Based Pruning, ICCV 2025)
    output_energy    C_jj ||W_j||^2: the squared error of the output, the mean being made up for
    obs              ||W_j||^2 / [C^-1]_jj: the same, the kept units making up for it, too (optimal
                     brain surgeon, Hassibi and Stork 1993)
    surgeon          the same in greedy order: the least goes, the others take over, and again

A head has what its value dims have together. A query-key dim has E[q_i^2] Var[k_i], the squared
error of the attention logits, in place of the energies; for obs and surgeon, what the best smaller
query-key product loses (`query_key_spectrum`), the least for the dim of least energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import MomentsError
from vitrim.network.structure import Attention, Layer, Part, Site, Structure
from vitrim.network.survivors import head_of

Criterion = Literal[
    "random", "magnitude", "group_l2", "taylor", "variance", "output_energy", "obs", "surgeon"
]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
WITHOUT_IMAGES: tuple[Criterion, ...] = ("random", "magnitude", "group_l2")

_POOL, _ROUND = 512, 128  # candidates of the greedy order, and how many of them go in one round
_EXACT = 1536  # up to this many units, the greedy order is computed in float64

Moments = Mapping[str, Mapping[str, Tensor]]


def score(
    net: nn.Module,
    described: Structure,
    moments: Moments,
    site: Site,
    *,
    criterion: Criterion,
    ridge: float,
    seed: int,
    most: int | None = None,
) -> Tensor:
    """Return the importance of every unit of `site`, higher is kept, float64, shape (size,).

    Args:
        net: the dense network.
        described: its structure.
        moments: of the layers that read the units, by layer; of queries and keys, by site.
        site: of hidden units, heads, query-key dims or value dims.
        criterion: see above.
        ridge: added to the diagonal of C, relative to its mean, for obs and surgeon.
        seed: of the random criterion.
        most: see `surgeon`.
    """
    heads = {attention.heads: attention for attention in described.attentions}
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed + [*described.sites].index(site.name))
        return torch.rand(site.size, generator=generator, dtype=torch.float64)
    if site.name in heads:
        return _heads(net, described, moments, heads[site.name], criterion, ridge)
    if criterion in ("magnitude", "group_l2"):
        return _norms(net, described, site, criterion)
    for attention in described.attentions:
        if site.name == attention.qk:
            return _query_key(moments, site, criterion)
    reader = reader_of(described, site.name)
    found = _found(moments, reader.name)
    if criterion == "taylor":
        return found["taylor"].double()
    cov, outgoing = found["cov"], _outgoing(net, reader)
    match criterion:
        case "variance":
            return cov.diagonal().double()
        case "output_energy":
            return cov.diagonal().double() * outgoing.double().square().sum(1)
        case "obs":
            inverse = _inverse(cov.double(), ridge)
            return outgoing.double().square().sum(1) / inverse.diagonal()
        case _:
            return surgeon(cov, outgoing, ridge=ridge, most=most)


def reader_of(described: Structure, site: str) -> Layer:
    """Return the layer whose input columns are the units of `site`, one each."""
    for layer in described.layers:
        if not layer.gathers and any(part.site == site for part in layer.inp):
            return layer
    raise MomentsError(f"site {site!r}: no layer reads its units one by one")


def _found(moments: Moments, name: str) -> Mapping[str, Tensor]:
    if name not in moments:
        raise MomentsError(f"{name}: this criterion needs calibration images, and there were none")
    return moments[name]


def _outgoing(net: nn.Module, reader: Layer) -> Tensor:
    """Return the weights by which each unit is read, shape (units, out)."""
    return net.get_parameter(f"{reader.name}.weight").detach().T


def _norms(net: nn.Module, described: Structure, site: Site, criterion: Criterion) -> Tensor:
    """Return magnitude or group_l2 of each unit, shape (size,)."""
    total = torch.zeros(site.size, dtype=torch.float64)
    for weights in _weights(net, described, site.name, columns=criterion == "group_l2"):
        wide = weights.double()
        total += wide.square().sum(1) if criterion == "group_l2" else wide.abs().sum(1)
    return total.sqrt() if criterion == "group_l2" else total


def _weights(net: nn.Module, described: Structure, site: str, *, columns: bool) -> list[Tensor]:
    """Return the rows that make the units and, with `columns`, the columns that read them."""
    found = []
    for layer in described.layers:
        weight = net.get_parameter(f"{layer.name}.weight").detach()
        if weight.ndim == 1:
            continue  # a norm's: it scales what others make
        for part in layer.out:
            if part.site == site:
                found.append(_run(weight, part))
        for part in layer.inp if columns else ():
            if part.site == site:
                found.append(_run(weight.movedim(1, 0), part))
    return found


def _run(weight: Tensor, part: Part) -> Tensor:
    return weight[part.offset : part.offset + part.size].flatten(1)


def _heads(
    net: nn.Module,
    described: Structure,
    moments: Moments,
    attention: Attention,
    criterion: Criterion,
    ridge: float,
) -> Tensor:
    """Return one score per head, shape (heads,)."""
    v = described.sites[attention.v]
    of_head = head_of(v)
    n_heads = len(v.head_dims)
    if criterion in ("magnitude", "group_l2"):
        power = 2.0 if criterion == "group_l2" else 1.0
        total = torch.zeros(n_heads, dtype=torch.float64)
        for name in (attention.qk, attention.v):
            site = described.sites[name]
            norms = _norms(net, described, site, criterion) ** power
            total.index_add_(0, head_of(site), norms)
        return total ** (1 / power)
    reader = reader_of(described, attention.v)
    found = _found(moments, reader.name)
    if criterion == "taylor":
        return torch.zeros(n_heads, dtype=torch.float64).index_add_(
            0, of_head, found["taylor"].double()
        )
    cov, outgoing = found["cov"].double(), _outgoing(net, reader).double()
    groups = [(of_head == head).nonzero()[:, 0] for head in range(n_heads)]
    match criterion:
        case "variance":
            return torch.stack([cov.diagonal()[group].sum() for group in groups])
        case "output_energy":
            return torch.stack([_energy(cov, outgoing, group) for group in groups])
        case "obs":
            inverse = _inverse(cov, ridge)
            return torch.stack([_loss(inverse, outgoing, group) for group in groups])
        case _:
            return _surgeon_groups(cov, outgoing, groups, ridge)


def _energy(cov: Tensor, outgoing: Tensor, group: Tensor) -> Tensor:
    """Return the squared error of the output if the group's units were replaced by their means."""
    within = cov[group][:, group]
    return (within @ outgoing[group] * outgoing[group]).sum()


def _loss(inverse: Tensor, outgoing: Tensor, group: Tensor) -> Tensor:
    """Return the same where the other units make up for the group."""
    within = inverse[group][:, group]
    taken: Tensor = torch.linalg.solve(within, outgoing[group])
    return (taken * outgoing[group]).sum()


def _query_key(moments: Moments, site: Site, criterion: Criterion) -> Tensor:
    """Return one score per query-key dim, shape (size,)."""
    found = _found(moments, site.name)
    if criterion == "taylor":
        return found["taylor"].double()
    scores = []
    for head in range(len(site.head_dims)):
        q, k = query_key_moments(found, head)
        energy = q.diagonal() * k.diagonal()
        if criterion in ("obs", "surgeon"):
            rank = energy.argsort(descending=True, stable=True)
            lost = query_key_spectrum(q, k)[1].square()
            energy = torch.empty_like(lost).index_copy_(0, rank, lost)
        scores.append(energy)
    return torch.cat(scores)


def query_key_moments(found: Mapping[str, Tensor], head: int) -> tuple[Tensor, Tensor]:
    """Return E[q q^T] and Cov[k] of one head, float64, (K, K) each.

    Keys are centred: what is added to every key adds the same to all logits of a query, which the
    softmax takes away again.
    """
    q, k = found["q.cov"][head].double(), found["k.cov"][head].double()
    mean = found["q.mean"][head].double()
    return q + torch.outer(mean, mean), k


def query_key_spectrum(q: Tensor, k: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the two bases in which a head's logits fall into dims of decreasing energy, and those.

    With S S^T = q, T T^T = k and S^T T = U diag(s) V^T, the first r columns of the bases
    A = S^-T U sqrt(s) and B = T^-T V sqrt(s) make the rank-r product (A^T q)(B^T k) that comes
    nearest to the logits q k in squared error; s_i^2 is what dim i adds.
    """
    s, s_inverse = _root(q)
    t, t_inverse = _root(k)
    u, spectrum, v = torch.linalg.svd(s.T @ t)
    scale = spectrum.sqrt()
    return (s_inverse.T @ u * scale, t_inverse.T @ v.T * scale), spectrum


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a square root S S^T of a positive matrix, and its inverse, zero where S is."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0.0)
    root = values.sqrt()
    safe = torch.where(values > 1e-12 * values.max(), root, torch.inf)
    return vectors * root, vectors.T / safe[:, None]


def _inverse(cov: Tensor, ridge: float) -> Tensor:
    """Return the inverse of C with `ridge` of its mean diagonal added, of I where C is zero.

    Float32 is left for float64 where it fails.
    """
    mean = float(cov.diagonal().mean())
    found = cov.clone()
    found.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    _invert(found)
    if found.dtype == torch.float64 or bool((found.diagonal() > 0).all()):
        return found
    return _inverse(cov.double(), ridge).to(cov.dtype)


def _invert(matrix: Tensor) -> None:
    """Invert a positive matrix in its place, by halves: matrix products, at full speed.

    Only the upper triangle is read: what rounding does to the other cannot grow.
    """
    size = len(matrix)
    if size <= 128:
        matrix.copy_(torch.linalg.inv(matrix.triu() + matrix.triu(1).mT))
        return
    at = size // 2
    first, across, last = matrix[:at, :at], matrix[:at, at:], matrix[at:, at:]
    _invert(first)
    takes = first @ across
    _subtract(last, across.mT, takes)
    _invert(last)
    corner = takes @ last
    first.addmm_(corner, takes.mT)
    matrix[:at, at:] = -corner
    matrix[at:, :at] = -corner.mT


def _subtract(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract a symmetric product from the upper triangle of `matrix`; the lower is left alone."""
    step = max(128, -(-len(matrix) // 8))
    for at in range(0, len(matrix), step):
        matrix[at : at + step, at:].addmm_(left[at : at + step], right[:, at:], alpha=-1)


def surgeon(cov: Tensor, outgoing: Tensor, *, ridge: float, most: int | None = None) -> Tensor:
    """Return scores that rise in the order of greedy removal: cost of each removal, made monotone.

    Removing unit j costs ||W_j||^2 / [C^-1]_jj; then W and C^-1 are updated as if the kept units
    had taken over what they can. Units that are equal go one at a time, the higher index first.

    The exact updates of a round run among the cheapest 512 units; the other units get them together
    at the round's end. It ends when a unit outside may be the next. As costs nearly always rise,
    the order is that of removal one by one: exactly so on the blocks of ViT-Ti that we compared.

    Args:
        cov: covariance of the units, (M, M).
        outgoing: W, the weights by which they are read, (M, D).
        ridge: added to the diagonal of C, relative to its mean.
        most: how many units will be removed; those left after as many are ranked by what each would
            cost next. None: all.
    """
    dtype = torch.float64 if len(cov) <= _EXACT else torch.float32
    inverse = _inverse(cov.to(dtype), ridge)  # of which the upper triangle is kept up to date
    weights = outgoing.to(dtype, copy=True).contiguous()
    units, live = torch.arange(len(cov)), torch.ones(len(cov), dtype=torch.bool)
    most = len(cov) if most is None else min(most, len(cov))
    order: list[int] = []
    costs: list[float] = []
    while True:
        now = weights.square().sum(1) / inverse.diagonal()
        now[~live] = torch.inf
        ranked = len(now) - 1 - now.flip(0).argsort(stable=True)[: len(cov) - len(order)]
        if len(order) >= most:
            rest = ranked.tolist()
            return _rising(order + units[rest].tolist(), costs + now[rest].tolist())
        pool, outside = ranked[:_POOL].sort(descending=True).values, ranked[_POOL : _POOL + 1]
        least = float(now[outside]) if len(outside) else torch.inf
        among = inverse.index_select(0, pool).index_select(1, pool)
        among = among.tril() + among.tril(-1).mT  # as the pool falls, its lower triangle is valid
        picks, found = _round(among, weights[pool], least, min(_ROUND, most - len(order)))
        gone = pool[picks]
        order += units[gone].tolist()
        costs += found
        rows = _rows(inverse, gone)
        takes = torch.linalg.inv(rows.index_select(1, gone).double()).to(dtype) @ rows
        weights.addmm_(takes.mT, weights[gone], alpha=-1)
        _subtract(inverse, rows.mT, takes)
        live[gone] = False
        inverse.diagonal()[~live] = 1.0  # what is left there means nothing
        if int(live.sum()) < 0.8 * len(live):
            left = live.nonzero()[:, 0]
            inverse = inverse.index_select(0, left).index_select(1, left)
            weights, units, live = weights[left], units[left], live[left]


def _rows(upper: Tensor, index: Tensor) -> Tensor:
    """Return rows of the symmetric matrix with that upper triangle."""
    right = torch.arange(len(upper)) >= index[:, None]
    return torch.where(right, upper.index_select(0, index), upper.index_select(1, index).mT)


def _round(
    inverse: Tensor, weights: Tensor, least: float, most: int
) -> tuple[list[int], list[float]]:
    """Remove up to `most` of the pool's units one by one; return which, and what each one cost.

    The round ends where the next would cost more than `least`, the cheapest unit outside. Of the
    two matrices (inverse, and products of weights) only the diagonals are kept up to date; a row is
    worked out when its unit goes, as in a pivoted Cholesky decomposition.
    """
    a = inverse.double().numpy()
    p = (weights @ weights.T).double().numpy()
    most = min(most, len(a))
    a_rows, takes, gains = (np.empty((most, len(a))) for _ in range(3))
    a_left, p_left, dead = a.diagonal().copy(), p.diagonal().copy(), np.zeros(len(a))
    picks: list[int] = []
    costs: list[float] = []
    for step in range(most):
        cost = p_left / a_left.clip(1e-300) + dead
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
        a_left -= take * a_row
        p_left -= 2.0 * take * gain
    return picks, costs


def _surgeon_groups(
    cov: Tensor, outgoing: Tensor, groups: Sequence[Tensor], ridge: float
) -> Tensor:
    """Return scores that rise in the order of greedy removal of whole groups, shape (groups,)."""
    inverse, weights = _inverse(cov, ridge), outgoing.clone()
    left = list(range(len(groups)))
    order: list[int] = []
    costs: list[float] = []
    while left:
        losses = {group: float(_loss(inverse, weights, groups[group])) for group in reversed(left)}
        worst = min(losses, key=losses.__getitem__)
        left.remove(worst)
        order.append(worst)
        costs.append(losses[worst])
        gone = groups[worst]
        takes = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weights = weights - takes.T @ weights[gone]
        inverse = inverse - inverse[:, gone] @ takes
        rest = torch.cat([groups[group] for group in left]) if left else gone
        keep = torch.zeros(len(cov), dtype=torch.bool)
        keep[rest] = True
        inverse[~keep], inverse[:, ~keep] = 0.0, 0.0
        inverse.diagonal()[~keep] = 1.0
    return _rising(order, costs)


def _rising(order: Sequence[int], costs: Sequence[float]) -> Tensor:
    """Return the costs at their units' places, each at least a little above the one before."""
    steps = torch.tensor(costs, dtype=torch.float64).clamp_min(0.0)
    highest = steps.cummax(0).values
    floor = float(highest[-1]) * 1e-12 + 1e-300
    rising = highest + floor * torch.arange(1, len(order) + 1, dtype=torch.float64)
    return torch.empty_like(rising).index_copy_(0, torch.tensor(order), rising)
