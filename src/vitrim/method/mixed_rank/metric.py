"""Decompositions under the metrics that inputs and outputs give, and what their errors cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from vitrim.method.mixed_rank.settings import MixedRankRidges, Rule
from vitrim.network.computing import on_device
from vitrim.network.decompose import Spectrum, decompose, output_errors, output_metric

Decomposition = Literal[
    "plain", "asvd", "whitening", "normalised_output", "mean_input", "centred", "loss"
]
DECOMPOSITIONS: tuple[Decomposition, ...] = get_args(Decomposition)
CENTRED: tuple[Decomposition, ...] = ("centred", "loss")
"""Those in which the bias takes over what the factors do to the mean."""


def input_gram(name: Decomposition, statistics: Mapping[str, Tensor]) -> Tensor | None:
    """Return C of a layer from its statistics, float64, (in, in); None is the identity."""
    match name:
        case "plain":
            return None
        case "asvd":
            return torch.diag(statistics["abs"].double())
        case "mean_input":
            tokens = statistics["tokens"].double()
            return tokens.mT @ tokens / len(tokens)
        case "centred" | "loss":
            return statistics["cov"].double()
        case "whitening" | "normalised_output":
            mean = statistics["mean"].double()
            return statistics["cov"].double() + torch.outer(mean, mean)


@on_device
def spectrum_of(
    weight: Tensor,
    statistics: Mapping[str, Tensor],
    decomposition: Decomposition,
    ridges: MixedRankRidges,
    *,
    biased: bool,
) -> Spectrum:
    """Return the spectrum of a weight (out, in); plain where there are no statistics.

    Without a bias (`biased`), nothing can take over the mean: it is part of the metric.
    """
    if not statistics:
        return decompose(weight, None, ridge=ridges.metric)
    if "metric" in statistics:  # of the rule kl
        inputs, effects = statistics["metric"].double(), statistics["outputs"].double()
        return decompose(weight.double(), inputs, ridge=ridges.metric, outputs=effects)
    centred = decomposition in CENTRED
    metric = input_gram("whitening" if centred and not biased else decomposition, statistics)
    if decomposition != "loss":
        return decompose(weight, metric, ridge=ridges.metric)
    gradients = statistics["gradient_products"], statistics["gradient_squares"]
    outputs = output_metric(weight, *gradients, ridges.gradient_shrinkage)
    spectrum = decompose(weight, metric, ridge=ridges.metric, outputs=outputs)
    if outputs is None:  # nothing depends on these outputs
        return spectrum._replace(energy=torch.zeros_like(spectrum.energy))
    return spectrum


def component_losses(
    spectrum: Spectrum,
    statistics: Mapping[str, Tensor],
    decomposition: Decomposition,
    rule: Rule,
) -> Tensor:
    """Return what removing each component costs: output error, or its effect on the logits."""
    by_loss = decomposition == "loss"
    if rule == "error" and by_loss and "cov" in statistics:
        down, squares = spectrum.down.double(), spectrum.up.double().square().sum(0)
        errors = squares * output_errors(down, statistics["cov"].double())
        return torch.where(spectrum.energy > 0, errors, 0.0)
    if rule != "loss" or by_loss or "gradient_squares" not in statistics:
        return spectrum.energy
    parts = spectrum.up.double().square()
    gradient_squares = statistics["gradient_squares"][:, None]
    gain = (gradient_squares * parts).sum(0) / parts.sum(0).clamp_min(1e-300)
    return spectrum.energy * gain


@on_device
def rank_curves(
    weight: Tensor, spectrum: Spectrum, metric: Tensor | None, *, points: int = 24
) -> dict[str, Sequence[float]]:
    """Return what a layer keeps and loses at every rank, for figures.

    Args:
        weight: W, (out, in).
        spectrum: of W, under any metric.
        metric: C, in which output errors are measured, (in, in); None is the identity.
        points: about how many ranks, from 1 to the full one, evenly spaced in their logarithm.

    Returns:
        `rank`, rising; `energy`, the fraction of W's squared singular values that the rank keeps;
        `error`, ||W x - W_r x|| / ||W x|| of the spectrum's factors; `plain_error`, the same of the
        truncated SVD.
    """
    wide = weight.detach().double()
    plain = decompose(wide, None)
    full = len(plain.energy)
    ranks = sorted({round(full ** (i / max(1, points - 1))) for i in range(points)} | {full})
    kept = plain.energy.cumsum(0)
    fractions = kept / kept[-1] if float(kept[-1]) > 0 else torch.ones_like(kept)
    index = torch.tensor(ranks).to(fractions.device)
    return {
        "rank": ranks,
        "energy": fractions[index - 1].tolist(),
        "error": _errors(spectrum, metric)[index].tolist(),
        "plain_error": _errors(plain, metric)[index].tolist(),
    }


def _errors(spectrum: Spectrum, metric: Tensor | None) -> Tensor:
    """Return the normalised output error at every rank from 0 to full, (k + 1,).

    At rank r the lost part is the sum of the components from the r-th on, so its squared norm is
    the sum of their inner products: the lower right corner of a matrix, summed from its far end.
    """
    up, down = spectrum.up.double(), spectrum.down.double()
    measured = down if metric is None else down @ metric.to(down)
    products = (up.mT @ up) * (measured @ down.mT)
    corners = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0.0)
    total = corners[0] if float(corners[0]) > 0 else torch.ones_like(corners[0])
    return torch.cat([corners / total, corners.new_zeros(1)]).sqrt()
