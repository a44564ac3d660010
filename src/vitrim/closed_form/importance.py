"""How much each unit of a site matters: from its weights, and from moments of its activations.

For a unit j of a site, W_j is the column of the Linear that reads it, C the covariance of all units
of the site, and P, K are the removed and the kept units:

    random           random numbers
    magnitude        sum |w| over the weights whose output is the unit
    group_l2         sqrt(sum w^2) over all weights that are removed with the unit
    taylor           E |sum_tokens x_j dL/dx_j|, first order (Molchanov et al., arXiv 1611.06440; L
                     is the loss of the network's own decision, without labels)
    variance         C_jj (as in VBP, Variance-Based Pruning, ICCV 2025, which takes all tokens with
                     one weight; here they are sampled and weighted as `Sampling` says)
    output_energy    C_jj ||W_j||^2: the squared error of the output if the unit is replaced by its
                     mean
    obs              ||W_j||^2 / [C^-1]_jj: the same if the kept units compensate as well (optimal
                     brain surgeon, Hassibi and Stork 1993)
    obs_greedy       obs in greedy order: the cheapest unit is removed, then costs are updated

The importance of a head is that of its value dims together. For a query-key dim, E[q_i^2] Var[k_i],
the squared error of the attention logits, replaces the energies; obs and obs_greedy use the loss of
the best smaller query-key product (`query_key_spectrum`), the least for the dim of least energy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import MomentsError, MomentTensors
from vitrim.closed_form.obs import (
    obs_greedy,
    obs_greedy_groups,
    obs_loss,
    regularised_inverse,
)
from vitrim.closed_form.query_key import query_key_moments, query_key_spectrum
from vitrim.network.structure import Attention, Layer, Part, Site, Structure
from vitrim.network.survivors import head_of

Criterion = Literal[
    "random", "magnitude", "group_l2", "taylor", "variance", "output_energy", "obs", "obs_greedy"
]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
WITHOUT_IMAGES: tuple[Criterion, ...] = ("random", "magnitude", "group_l2")


def importance(
    net: nn.Module,
    described: Structure,
    moments: MomentTensors,
    site: Site,
    *,
    criterion: Criterion,
    ridge: float,
    seed: int,
    n_removed: int | None = None,
) -> Tensor:
    """Return the importance of every unit of `site`, higher is kept, float64, shape (size,).

    Args:
        net: the dense network.
        described: its structure.
        moments: of the layers that read the units, by layer; of queries and keys, by site.
        site: of hidden units, heads, query-key dims or value dims.
        criterion: see above.
        ridge: added to the diagonal of C, relative to its mean, for obs and obs_greedy.
        seed: of the random criterion.
        n_removed: see `obs_greedy`.
    """
    heads = {attention.heads: attention for attention in described.attentions}
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed + [*described.sites].index(site.name))
        return torch.rand(site.size, generator=generator, dtype=torch.float64)
    if site.name in heads:
        return _heads(net, described, moments, heads[site.name], criterion, ridge)
    if criterion in ("magnitude", "group_l2"):
        return _norms(net, described, site, criterion)
    if site.kind == "qk":
        return _query_key(moments, site, criterion)
    consumer = consumer_of(described, site.name)
    statistics = _statistics(moments, consumer.name)
    if criterion == "taylor":
        return statistics["taylor"].double()
    cov, outgoing = statistics["cov"], _outgoing(net, consumer)
    match criterion:
        case "variance":
            return cov.diagonal().double()
        case "output_energy":
            return cov.diagonal().double() * outgoing.double().square().sum(1)
        case "obs":
            inverse = regularised_inverse(cov.double(), ridge)
            return outgoing.double().square().sum(1) / inverse.diagonal()
        case _:
            return obs_greedy(cov, outgoing, ridge=ridge, n_removed=n_removed)


def consumer_of(described: Structure, site: str) -> Layer:
    """Return the layer whose input columns are the units of `site`, one each."""
    for layer in described.layers:
        if not layer.gathers and any(part.site == site for part in layer.inp):
            return layer
    raise MomentsError(f"site {site!r}: no layer reads its units one by one")


def _statistics(moments: MomentTensors, name: str) -> Mapping[str, Tensor]:
    if name not in moments:
        raise MomentsError(f"{name}: this criterion needs calibration images, and there are none")
    return moments[name]


def _outgoing(net: nn.Module, consumer: Layer) -> Tensor:
    """Return the weights that read each unit, shape (units, out)."""
    return net.get_parameter(f"{consumer.name}.weight").detach().T


def _norms(net: nn.Module, described: Structure, site: Site, criterion: Criterion) -> Tensor:
    """Return magnitude or group_l2 of each unit, shape (size,)."""
    total = torch.zeros(site.size, dtype=torch.float64)
    for weights in _weights(net, described, site.name, columns=criterion == "group_l2"):
        wide = weights.double()
        total += wide.square().sum(1) if criterion == "group_l2" else wide.abs().sum(1)
    return total.sqrt() if criterion == "group_l2" else total


def _weights(net: nn.Module, described: Structure, site: str, *, columns: bool) -> list[Tensor]:
    """Return the rows that compute the units and, with `columns`, the columns that read them."""
    weights = []
    for layer in described.layers:
        weight = net.get_parameter(f"{layer.name}.weight").detach()
        if weight.ndim == 1:
            continue  # a norm only scales the units
        for part in layer.out:
            if part.site == site:
                weights.append(_run(weight, part))
        for part in layer.inp if columns else ():
            if part.site == site:
                weights.append(_run(weight.movedim(1, 0), part))
    return weights


def _run(weight: Tensor, part: Part) -> Tensor:
    return weight[part.offset : part.offset + part.size].flatten(1)


def _heads(
    net: nn.Module,
    described: Structure,
    moments: MomentTensors,
    attention: Attention,
    criterion: Criterion,
    ridge: float,
) -> Tensor:
    """Return one score per head, shape (heads,)."""
    v = described.sites[attention.v]
    of_head = head_of(v)
    n_heads = len(v.head_dims)
    if criterion in ("magnitude", "group_l2"):
        return _head_norms(net, described, attention, criterion)
    consumer = consumer_of(described, attention.v)
    statistics = _statistics(moments, consumer.name)
    if criterion == "taylor":
        return torch.zeros(n_heads, dtype=torch.float64).index_add_(
            0, of_head, statistics["taylor"].double()
        )
    cov, outgoing = statistics["cov"].double(), _outgoing(net, consumer).double()
    groups = [(of_head == head).nonzero()[:, 0] for head in range(n_heads)]
    match criterion:
        case "variance":
            return torch.stack([cov.diagonal()[group].sum() for group in groups])
        case "output_energy":
            return torch.stack([_energy(cov, outgoing, group) for group in groups])
        case "obs":
            inverse = regularised_inverse(cov, ridge)
            return torch.stack([obs_loss(inverse, outgoing, group) for group in groups])
        case _:
            return obs_greedy_groups(cov, outgoing, groups, ridge=ridge)


def _head_norms(
    net: nn.Module, described: Structure, attention: Attention, criterion: Criterion
) -> Tensor:
    """Return magnitude or group_l2 of the query-key and value dims of each head, (heads,)."""
    power = 2.0 if criterion == "group_l2" else 1.0
    n_heads = len(described.sites[attention.v].head_dims)
    total = torch.zeros(n_heads, dtype=torch.float64)
    for name in (attention.qk, attention.v):
        site = described.sites[name]
        norms = _norms(net, described, site, criterion) ** power
        total.index_add_(0, head_of(site), norms)
    return total ** (1 / power)


def _energy(cov: Tensor, outgoing: Tensor, group: Tensor) -> Tensor:
    """Return the squared error of the output if the group's units were replaced by their means."""
    within = cov[group][:, group]
    return (within @ outgoing[group] * outgoing[group]).sum()


def _query_key(moments: MomentTensors, site: Site, criterion: Criterion) -> Tensor:
    """Return one score per query-key dim, shape (size,)."""
    statistics = _statistics(moments, site.name)
    if criterion == "taylor":
        return statistics["taylor"].double()
    scores = []
    for head in range(len(site.head_dims)):
        q, k = query_key_moments(statistics, head)
        energy = q.diagonal() * k.diagonal()
        if criterion in ("obs", "obs_greedy"):
            rank = energy.argsort(descending=True, stable=True)
            loss = query_key_spectrum(q, k)[1].square()
            energy = torch.empty_like(loss).index_copy_(0, rank, loss)
        scores.append(energy)
    return torch.cat(scores)
