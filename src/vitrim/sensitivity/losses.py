"""What removing each unit, direction or component costs: predicted KL, from second moments.

All losses are in one unit: the KL divergence (nats, at the temperature T) from the dense network's
decision that the Gauss-Newton matrix predicts, mean over images. The moments give E<s, dz>^2, which
is 2 T^2 times that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitrim.closed_form.obs import obs_greedy
from vitrim.closed_form.query_key import query_key_spectrum
from vitrim.network.computing import on_device


class Rotation(NamedTuple):
    """A basis of the dims of one head, and what removing each direction costs, (K,), descending.

    `rows` (K, K) maps the dims to the directions, `columns` (K, K) back, so that the head computes
    the same in either basis. For queries and keys, `rows` maps the queries and `columns` the keys.
    """

    rows: Tensor
    columns: Tensor
    losses: Tensor


@on_device
def root_of(matrix: Tensor) -> Tensor:
    """Return R (n, n) with R R^T equal to a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root


@on_device
def inverse_root_of(matrix: Tensor, ridge: float) -> Tensor:
    """Return (M + ridge mean(diag M) I)^(-1/2) of a positive semidefinite matrix, (n, n).

    Args:
        matrix: M, (n, n); where it is zero, I is added to it.
        ridge: relative to the mean of its diagonal.
    """
    values, vectors = torch.linalg.eigh(matrix)
    floor = ridge * float(matrix.diagonal().mean())
    root: Tensor = (vectors / (values.clamp_min(0.0) + (floor or 1.0)).sqrt()) @ vectors.mT
    return root


@on_device
def effects_of(weight: Tensor, products: Tensor, squares: Tensor, shrinkage: float) -> Tensor:
    """Return E (in, r) with E E^T = W^T G W: what a change of each input does to the decision.

    Args:
        weight: W, (out, in).
        products: G (out, out), or W^T G W (in, in) if that is smaller.
        squares: the diagonal of G, (out,).
        shrinkage: fraction of the products of different outputs that is left out.
    """
    if len(products) == len(weight):
        root = root_of(torch.lerp(products, torch.diag(squares), shrinkage))
        return (root.mT.to(weight) @ weight).mT
    return root_of(torch.lerp(products, weight.mT @ (squares[:, None] * weight), shrinkage))


def unit_losses(effects: Tensor, cov: Tensor, ridge: float) -> Tensor:
    """Return the loss of each hidden unit when it goes in greedy order, (M,).

    Args:
        effects: of the units, E (M, r), see `effects_of`.
        cov: C of the units, (M, M).
        ridge: added to the diagonal of C, relative to its mean.
    """
    return obs_greedy(cov, effects, ridge=ridge)


@on_device
def unit_losses_in_order(effects: Tensor, cov: Tensor, order: Tensor, ridge: float) -> Tensor:
    """Return what each unit adds to the loss when units go in this order, (M,).

    The units that are left make up for those that went: of the removed units P and the others S,
    the loss is tr(E_P^T H E_P), with H = C_PP - C_PS C_SS^-1 C_SP.

    Args:
        effects: of the units, E (M, r), see `effects_of`.
        cov: C of the units, (M, M).
        order: the units, the one that goes first first, (M,).
        ridge: added to the diagonal of C, relative to its mean.
    """
    last_first = order.flip(0)
    ridged = cov[last_first][:, last_first].double()
    mean = float(cov.diagonal().mean())
    ridged.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    factor = torch.linalg.cholesky(ridged)  # its lower right corners are the factors of H
    costs = (factor.mT @ effects.to(ridged)[last_first]).square().sum(1)
    losses = torch.empty_like(costs)
    losses[last_first] = costs
    return losses


@on_device
def plain_unit_losses(effects: Tensor, cov: Tensor, order: Tensor) -> Tensor:
    """Return what each unit adds to the loss in this order if nothing makes up for it, (M,).

    Args:
        effects: of the units, E (M, r), see `effects_of`.
        cov: C of the units, (M, M).
        order: the units, the one that goes first first, (M,).
    """
    return plain_losses_in_order(cov * (effects @ effects.mT), order)


def plain_losses_in_order(products: Tensor, order: Tensor) -> Tensor:
    """Return what each unit adds to the loss in this order if nothing makes up for it, (M,).

    Args:
        products: the loss of two units' errors together, (M, M): of a set, they add up.
        order: the units, the one that goes first first, (M,).
    """
    ordered = products[order][:, order].double()
    losses = torch.empty_like(ordered[:, 0])
    losses[order] = ordered.diagonal() + 2 * ordered.tril(-1).sum(1)
    return losses


def value_rotation(effects: Tensor, cov: Tensor) -> Rotation:
    """Return the directions of a head's values whose effect on the output is independent.

    Args:
        effects: of the head's values, E (K, r), see `effects_of`.
        cov: C of the head's outputs, (K, K).
    """
    half, inverse = _root(cov)
    effect = effects.mT @ half
    losses, vectors = torch.linalg.eigh(effect.mT @ effect)
    vectors = vectors.flip(1)
    return Rotation(vectors.mT @ inverse, half @ vectors, losses.flip(0).clamp_min(0.0))


def query_key_rotation(q: Tensor, k: Tensor, weight: float) -> Rotation:
    """Return the directions of a head's queries and keys in which their products decompose.

    Args:
        q: sum u q q^T, (K, K), before the scale of the scores.
        k: sum v k k^T, centred, (K, K).
        weight: the sum of the weights, times the number of images and the dense head's width.
    """
    (of_q, of_k), spectrum = query_key_spectrum(q, k)
    losses = spectrum.square() / weight if weight else torch.zeros_like(spectrum)
    return Rotation(of_q.mT, of_k.mT, losses)


def _root(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Return S with S S^T = C, and S^-1; variances below a millionth of the mean are raised."""
    values, vectors = torch.linalg.eigh(cov)
    floor = 1e-6 * float(cov.diagonal().mean())
    scale = values.clamp_min(floor if floor > 0 else 1.0).sqrt()
    return vectors * scale, vectors.mT / scale[:, None]
