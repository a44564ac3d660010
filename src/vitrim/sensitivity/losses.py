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


class Rotation(NamedTuple):
    """A basis of the dims of one head, and what removing each direction costs, (K,), descending.

    `rows` (K, K) maps the dims to the directions, `columns` (K, K) back, so that the head computes
    the same in either basis. For queries and keys, `rows` maps the queries and `columns` the keys.
    """

    rows: Tensor
    columns: Tensor
    losses: Tensor


def root_of(products: Tensor, squares: Tensor, shrinkage: float) -> Tensor:
    """Return R (n, n) with R R^T = G, after the products of different outputs are shrunk."""
    shrunk = torch.lerp(products, torch.diag(squares), shrinkage)
    values, vectors = torch.linalg.eigh(shrunk)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root


def unit_losses(weight: Tensor, cov: Tensor, root: Tensor, ridge: float) -> Tensor:
    """Return the loss of each hidden unit when it goes in greedy order, (M,).

    Args:
        weight: of the layer that reads the units, W (D, M).
        cov: C of the units, (M, M).
        root: R with R R^T = G, (D, D).
        ridge: added to the diagonal of C, relative to its mean.
    """
    return obs_greedy(cov, (root.mT.to(weight) @ weight).mT, ridge=ridge)


def value_rotation(weight: Tensor, cov: Tensor, root: Tensor) -> Rotation:
    """Return the directions of a head's values whose effect on the output is independent.

    Args:
        weight: the columns of the output projection that read the head, (D, K).
        cov: C of the head's outputs, (K, K).
        root: R with R R^T = G, (D, D).
    """
    half, inverse = _root(cov)
    effect = root.mT @ weight @ half
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
