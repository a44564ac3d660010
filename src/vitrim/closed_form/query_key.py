"""The products of queries and keys of a head: their moments, and their best low-rank form."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def query_key_moments(statistics: Mapping[str, Tensor], head: int) -> tuple[Tensor, Tensor]:
    """Return E[q q^T] and Cov[k] of one head, float64, (K, K) each.

    Keys are centred: adding the same vector to every key adds the same number to all logits of a
    query, which the softmax removes.
    """
    q, k = statistics["q.cov"][head].double(), statistics["k.cov"][head].double()
    mean = statistics["q.mean"][head].double()
    return q + torch.outer(mean, mean), k


def query_key_spectrum(q: Tensor, k: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return two bases that split a head's logits into dims of decreasing energy, and the energies.

    With S S^T = q, T T^T = k and S^T T = U diag(s) V^T, the first r columns of the bases
    A = S^-T U sqrt(s) and B = T^-T V sqrt(s) give the rank-r product (A^T q)(B^T k) that is nearest
    to the logits q k in squared error; dim i contributes s_i^2.
    """
    s, s_inverse = _root(q)
    t, t_inverse = _root(k)
    u, spectrum, v = torch.linalg.svd(s.T @ t)
    scale = spectrum.sqrt()
    return (s_inverse.T @ u * scale, t_inverse.T @ v.T * scale), spectrum


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return S with S S^T equal to a positive semidefinite matrix, and its pseudoinverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0.0)
    root = values.sqrt()
    safe = torch.where(values > 1e-12 * values.max(), root, torch.inf)
    return vectors * root, vectors.T / safe[:, None]
