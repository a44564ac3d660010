"""Metrics of decompositions: what an error of a layer is measured by, and curves of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from vitrim.network.decompose import Spectrum, decompose

Metric = Literal["plain", "asvd", "whitening", "normalised_output", "mean_input", "centred", "loss"]


METRICS: tuple[Metric, ...] = get_args(Metric)


def metric_of(name: Metric, found: Mapping[str, Tensor]) -> Tensor | None:
    """Return C of a layer from what was gathered on images, float64, (in, in); None is identity."""
    match name:
        case "plain":
            return None
        case "asvd":
            return torch.diag(found["abs"].double())
        case "mean_input":
            tokens = found["tokens"].double()
            return tokens.mT @ tokens / len(tokens)
        case "centred" | "loss":
            return found["cov"].double()
        case _:
            mean = found["mean"].double()
            return found["cov"].double() + torch.outer(mean, mean)


def mattering(weight: Tensor, moment: Tensor, slope: Tensor, shrinkage: float) -> Tensor | None:
    """Return how much outputs matter as `decompose` wants it; None where nothing depends on them.

    Few images give a poor estimate of how derivatives go together: their products are shrunk.
    Outputs that matter less than a thousandth of the mean count that.

    Args:
        weight: W, (out, in).
        moment: of the derivatives by the outputs, G (out, out), or W^T G W (in, in) if that is
            smaller.
        slope: the diagonal of G, (out,).
        shrinkage: share of the products that is left out, in [0, 1].
    """
    alone = slope.double().clamp_min(1e-3 * float(slope.double().mean()))
    if not bool((alone > 0).all()):
        return None
    wide = weight.double()
    narrow = len(weight) <= weight.shape[1]
    diagonal = torch.diag(alone) if narrow else wide.mT @ (alone[:, None] * wide)
    return torch.lerp(moment.to(diagonal), diagonal, shrinkage)


def curves(
    weight: Tensor, spectrum: Spectrum, metric: Tensor | None, *, points: int = 24
) -> dict[str, Sequence[float]]:
    """Return what a layer keeps and loses, rank by rank: what a figure of it needs.

    Args:
        weight: W, (out, in).
        spectrum: of W, under whatever metric.
        metric: C, in which output errors are measured, (in, in); None is the identity.
        points: about how many ranks, from 1 to the full one, evenly spread in their logarithm.

    Returns:
        `rank`, rising; `energy`, the share of W's squared singular values that the rank keeps;
        `error`, ||W x - W_r x|| / ||W x|| of the spectrum's factors; `plain_error`, the same of the
        truncated SVD.
    """
    wide = weight.detach().double()
    plain = decompose(wide, None)
    full = len(plain.energy)
    ranks = sorted({round(full ** (i / max(1, points - 1))) for i in range(points)} | {full})
    kept = plain.energy.cumsum(0)
    shares = kept / kept[-1] if float(kept[-1]) > 0 else torch.ones_like(kept)
    index = torch.tensor(ranks, device=shares.device)
    return {
        "rank": ranks,
        "energy": shares[index - 1].tolist(),
        "error": _errors(spectrum, metric)[index].tolist(),
        "plain_error": _errors(plain, metric)[index].tolist(),
    }


def _errors(spectrum: Spectrum, metric: Tensor | None) -> Tensor:
    """Return the normalised output error at every rank from 0 to full, (k + 1,).

    At rank r the lost part is the sum of the components from the r-th on, so that its squared norm
    is the sum of their inner products: the corner of a matrix, added up from its far end.
    """
    up, down = spectrum.up.double(), spectrum.down.double()
    met = down if metric is None else down @ metric.to(down)
    products = (up.mT @ up) * (met @ down.mT)
    corners = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0.0)
    whole = corners[0] if float(corners[0]) > 0 else torch.ones_like(corners[0])
    return torch.cat([corners / whole, corners.new_zeros(1)]).sqrt()
