"""The best two factors of a Linear's weight under a metric of its inputs, for all ranks at once.

For a weight W (out x in) and inputs with second moment C = E[x x^T], the factors of rank r give the
W_r with the least E||W x - W_r x||^2 = tr((W - W_r) C (W - W_r)^T). Two forms give it for every r
at once, from the eigenvectors of the smaller of two Gram matrices:

    out <= in    W C W^T = U E U^T        up = U        down = U^T W            (projection)
    out > in     S S^T = C, S^T W^T W S = V E V^T       up = W S V, down = V^T S^-1

The error of rank r is the sum of E from index r on. With an output metric G, the second moment of a
loss's derivatives by the outputs, tr(G (W - W_r) C (W - W_r)^T) is minimised:

    out <= in    R^T R = G, R W C W^T R^T = U E U^T          up = R^-1 U        down = U^T R W
    out > in     S^T (W^T G W) S = V E V^T, the rest as above

so that only R, or W^T G W, is needed of G: the smaller of the two. C is the input metric:

    plain              identity: the truncated SVD
    asvd               diag(E|x|): ASVD's scaling with exponent 1/2 (arXiv 2312.05821)
    whitening          E[x x^T] (SVD-LLM, arXiv 2403.07378)
    normalised_output  E[x x^T / ||W x||^2], the objective of the mixed-rank paper (arXiv
                       2402.06004); W is the dense qkv also where its pieces are factorised
    mean_input         X X^T of X the mean over images, token by token: that paper's own heuristic,
                       as far as it is known
    centred            Cov[x], ours: the bias absorbs the factors' error on the mean
    loss               centred, with G of the logits' derivatives, ours: energies are then in units
                       of the logits' squared change
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitrim.network.computing import on_device

_EXACT = 512  # up to this many rows, eigenvectors are computed in float64


class Spectrum(NamedTuple):
    """All ranks of one layer: up (out, k) and down (k, in), with k the smaller of out and in.

    `energy` (k,), float64 and descending, is what each component adds to E||W x||^2.
    """

    up: Tensor
    down: Tensor
    energy: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return up (out, rank) and down (rank, in), contiguous, of equal norms per component."""
        up, down = self.up[:, :rank], self.down[:rank]
        scale = (down.norm(dim=1) / up.norm(dim=0).clamp_min(1e-30)).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        return (up * scale).contiguous(), (down / scale[:, None]).contiguous()


@on_device
def output_metric(
    weight: Tensor, products: Tensor, squares: Tensor, shrinkage: float
) -> Tensor | None:
    """Return how much outputs matter as `decompose` wants it; None where nothing depends on them.

    Few images give a poor estimate of how gradients correlate: their products are shrunk. Outputs
    that matter less than a thousandth of the mean count that.

    Args:
        weight: W, (out, in).
        products: second moment of the gradients by the outputs, G (out, out), or W^T G W (in, in)
            if that is smaller.
        squares: the diagonal of G, (out,).
        shrinkage: fraction of the products that is left out, in [0, 1].
    """
    diagonal = squares.double().clamp_min(1e-3 * float(squares.double().mean()))
    if not bool((diagonal > 0).all()):
        return None
    wide = weight.double()
    narrow = len(weight) <= weight.shape[1]
    shrunk = torch.diag(diagonal) if narrow else wide.mT @ (diagonal[:, None] * wide)
    return torch.lerp(products.to(shrunk), shrunk, shrinkage)


@on_device
def truncated(spectrum: Spectrum, rank: int) -> Tensor:
    """Return W_r of the first `rank` components, (out, in)."""
    return spectrum.up[:, :rank] @ spectrum.down[:rank]


@on_device
def output_errors(change: Tensor, cov: Tensor) -> Tensor:
    """Return the mean square of D x by output, (out,).

    Args:
        change: D, (out, in).
        cov: second moment of x, (in, in), of the same type.
    """
    return (change @ cov * change).sum(1)


@on_device
def lost_output(weight: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """Return (W - up down) x, (out,), float64.

    Args:
        weight: W, (out, in).
        up: (out, r).
        down: (r, in).
        x: one input, (in,).
    """
    return (weight - up @ down).double() @ x.double()


@on_device
def decompose(
    weight: Tensor,
    metric: Tensor | None,
    *,
    ridge: float = 1e-6,
    outputs: Tensor | None = None,
) -> Spectrum:
    """Return the spectrum of `weight` under the metric C.

    Args:
        weight: W, (out, in).
        metric: C, symmetric and positive semidefinite, (in, in); None is the identity.
        ridge: added to the diagonal of C, relative to its mean, so that directions that no input
            had are defined.
        outputs: the output metric: G, positive definite, (out, out), or W^T G W (in, in) if that is
            smaller; None is the identity.
    """
    rows, columns = weight.shape
    level = 1.0 if metric is None else float(metric.diagonal().double().mean())
    if level <= 0.0:  # the inputs were zero, or constant
        plain = decompose(weight, None)
        return plain._replace(energy=torch.zeros_like(plain.energy))
    exact = min(rows, columns) <= _EXACT or weight.dtype == torch.float64
    wide = weight.double() if exact else weight.float()
    if rows <= columns:
        root, inverse = (None, None) if outputs is None else _root(outputs.double(), ridge)
        weighted = wide if root is None else root.mT.to(wide) @ wide
        half = weighted / 2 if metric is None else _halved(weighted, metric.to(wide), level, ridge)
        energy, u = _eigen(half @ weighted.mT)
        up = u if inverse is None else inverse.mT.to(wide) @ u
        down = u.mT @ weighted
    elif metric is None:
        energy, v = _eigen((wide.mT @ wide if outputs is None else outputs.to(wide)) / 2)
        up, down = wide @ v, v.mT
    else:
        scaled = metric.double() / level
        scaled.diagonal().add_(ridge)
        root, inverse = _root(scaled, ridge)
        narrow = root.to(wide)
        inner = wide.mT @ wide if outputs is None else outputs.to(wide)
        energy, v = _eigen(narrow.mT @ inner @ narrow / 2)
        up, down = wide @ (narrow @ v), v.double().mT @ inverse
    return Spectrum(
        up.to(weight.dtype), down.to(weight.dtype), energy.double().clamp_min(0.0) * level
    )


def _halved(wide: Tensor, metric: Tensor, level: float, ridge: float) -> Tensor:
    """Return W H with H triangular and H + H^T = C / level + ridge I, with half of the products.

    For fc2 of DeiT-B (768 x 3072, one thread) all of `decompose` is 1.26 times faster than with the
    whole product.
    """
    scaled, product = wide / level, 0.5 * ridge * wide
    step = max(128, -(-len(metric) // 8))
    for start in range(0, len(metric), step):
        block = slice(start, start + step)
        product[:, block] += scaled[:, :start] @ metric[:start, block]
        product[:, block] += 0.5 * scaled[:, block] @ metric[block, block]
    return product


def _root(moment: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return S with S S^T = C, and S^-1; eigenvalues below the ridge are raised to it."""
    root, failed = torch.linalg.cholesky_ex(moment)
    if not int(failed):
        eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        return root, torch.linalg.solve_triangular(root, eye, upper=False)
    values, vectors = torch.linalg.eigh(moment)
    scale = values.clamp_min(ridge * float(moment.diagonal().mean())).sqrt()
    return vectors * scale, vectors.T / scale[:, None]


def _eigen(half: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, descending, and eigenvectors (columns) of a matrix plus its transpose."""
    values, vectors = torch.linalg.eigh(half + half.mT)
    return values.flip(0), vectors.flip(1)
