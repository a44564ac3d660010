"""Closed-form changes to the kept weights that compensate for what a plan removes.

With x_P the removed and x_S the kept inputs of a Linear y = W x + b, over the calibration images:

    bias     b += W_P mean_P                                            (VBP, ICCV 2025)
    ridge    x_P ~ B x_S + c;  W_S += W_P B,  b += W_P c                (CORP, arXiv 2602.05243)

For queries and keys there is no such layer: bias does nothing, and ridge uses the query-key product
of the kept size that is nearest to the dense logits (`query_key_spectrum`). Only the number of dims
that the plan keeps in a head matters there, not which dims they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import MomentsError, MomentTensors
from vitrim.closed_form.query_key import query_key_moments, query_key_spectrum
from vitrim.network.attention import parameters_of
from vitrim.network.computing import on_device
from vitrim.network.structure import Attention, Layer, Structure
from vitrim.network.survivors import Kept, index_of, removed_of, resolve, widths_of
from vitrim.plan import Plan

Compensation = Literal["none", "bias", "ridge", "sequential"]
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation)


def reconstruct(
    net: nn.Module,
    compact: nn.Module,
    described: Structure,
    plan: Plan,
    moments: MomentTensors,
    *,
    kind: Compensation,
    ridge: float,
) -> dict[str, Tensor]:
    """Return new values for parameters of `compact`, by name.

    Args:
        net: the dense network.
        compact: `cut(net, plan)`.
        described: the structure of `net`.
        plan: what was cut.
        moments: of the layers whose inputs were cut, by layer; of queries and keys, by site.
        kind: see above; `sequential` is `ridge` here, followed by a recovery phase on images.
        ridge: added to the diagonal of the kept units' covariance, relative to its mean.

    Raises:
        MomentsError: moments of a layer are missing or not finite.
    """
    if kind == "none":
        return {}
    survivors = resolve(described, plan)
    values: dict[str, Tensor] = {}
    for layer in described.layers:
        kept = index_of(layer.inp, survivors)
        weight = net.get_parameter(f"{layer.name}.weight").detach()
        if not layer.gathers and len(kept) < weight.shape[1]:
            rows = index_of(layer.out, survivors)
            bias = compact.get_submodule(layer.name).bias
            weight = weight[rows].double()
            columns, offset = _fold(
                layer,
                weight,
                kept,
                moments,
                0.0 if kind == "bias" else ridge,
                biased=bias is not None,
            )
            if kind != "bias":
                values[f"{layer.name}.weight"] = columns
            if isinstance(bias, Tensor):
                values[f"{layer.name}.bias"] = bias.detach().double() + offset
    if kind != "bias":
        for attention in described.attentions:
            values |= _reduced_qk(net, compact, described, attention, survivors, moments)
    return {name: value.to(compact.get_parameter(name).dtype) for name, value in values.items()}


def _fold(
    layer: Layer,
    weight: Tensor,
    kept: Tensor,
    moments: MomentTensors,
    ridge: float,
    *,
    biased: bool,
) -> tuple[Tensor, Tensor]:
    """Return the new weight (out, kept) and the bias change (out,); without ridge, B is 0."""
    statistics = moments.get(layer.name)
    if statistics is None or not bool(torch.isfinite(statistics["mean"]).all()):
        raise MomentsError(f"{layer.name}: there are no finite moments of its inputs")
    removed = removed_of(weight.shape[1], kept).nonzero()[:, 0]
    mean = statistics["mean"].double()
    if not ridge:
        return weight[:, kept], weight[:, removed] @ mean[removed]
    cov = statistics["cov"]
    if not biased:  # without a constant, the regression goes through the origin
        cov = cov + torch.outer(mean, mean).to(cov)
    return _folded(weight, mean, cov, kept, removed, ridge)


@on_device
def _folded(
    weight: Tensor, mean: Tensor, cov: Tensor, kept: Tensor, removed: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return the new weight (out, kept) and the bias change (out,) by ridge regression."""
    removed_weight, rows = weight[:, removed], cov.index_select(0, kept)
    inputs, cross = (rows.index_select(1, units).double() for units in (kept, removed))
    folded = taken_over(inputs, cross, removed_weight, ridge)
    offset = removed_weight @ mean[removed] - folded @ mean[kept]
    return weight[:, kept] + folded, offset


@on_device
def taken_over(cov: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Return what is added to the weights of kept inputs, (out, kept), as others are removed.

    Args:
        cov: covariance of the kept inputs, (kept, kept), float64.
        cross: their covariance with the removed ones, (kept, removed).
        weight: of the removed inputs, (out, removed).
        ridge: relative to the kept inputs' mean variance, see `ridge_solve`.
    """
    return ridge_solve(cov, cross @ weight.mT, ridge).mT


@on_device
def ridge_fit(
    statistics: Mapping[str, Tensor], n_inputs: int, ridge: float, *, biased: bool
) -> tuple[Tensor, Tensor]:
    """Return the ridge regression of targets on inputs: weight (targets, inputs), bias (targets,).

    Args:
        statistics: finished moments of rows with the inputs first and the targets after them.
        n_inputs: number of inputs.
        ridge: relative to the inputs' mean variance, see `ridge_solve`.
        biased: whether the bias will be used; without it the regression goes through the origin.
    """
    cov, mean = statistics["cov"].double(), statistics["mean"]
    if not biased:
        cov = cov + torch.outer(mean, mean)
    weight = ridge_solve(cov[:n_inputs, :n_inputs], cov[:n_inputs, n_inputs:], ridge).T
    return weight, mean[n_inputs:] - weight @ mean[:n_inputs]


@on_device
def ridge_solve(cov: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return the ridge solution (C + ridge mean(diag C) I)^-1 X, and zero for constant inputs.

    Args:
        cov: C, covariance of the inputs, (n, n), float64.
        cross: X, their covariance with the targets, (n, targets).
        ridge: relative to the mean of C's diagonal.
    """
    level = ridge * float(cov.diagonal().mean())
    if level <= 0.0:
        return torch.zeros_like(cross)
    ridged = cov.clone()
    ridged.diagonal().add_(level)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if not int(failed):
        return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(ridged)  # the ridge is below the rounding error
    solution: Tensor = vectors @ ((vectors.T @ cross) / values.clamp_min(level)[:, None])
    return solution


def _reduced_qk(
    net: nn.Module,
    compact: nn.Module,
    described: Structure,
    attention: Attention,
    survivors: Kept,
    moments: MomentTensors,
) -> dict[str, Tensor]:
    """Return the qkv layer with the nearest smaller product in every head that loses dims."""
    site = described.sites[attention.qk]
    starts = [0, *accumulate(site.head_dims)]
    widths = widths_of(site, survivors).tolist()
    heads = survivors[attention.heads].tolist()
    narrowed = [head for head in heads if 0 < widths[head] < site.head_dims[head]]
    if not narrowed:
        return {}
    if attention.qk not in moments:
        raise MomentsError(f"{attention.qk}: there are no moments of its queries and keys")
    layer = next(layer for layer in described.layers if layer.name == attention.qkv)
    columns = index_of(layer.inp, survivors)
    statistics = moments[attention.qk]
    bases = {head: query_key_spectrum(*query_key_moments(statistics, head))[0] for head in narrowed}
    values = {}
    for name, parameter in parameters_of(net.get_submodule(attention.qkv)).items():
        dense = parameter.detach().double()
        dense = dense[:, columns] if name == "weight" else dense
        reduced = compact.get_parameter(f"{attention.qkv}.{name}").detach().double().clone()
        row, q_size = 0, sum(widths[head] for head in heads)
        for head in heads:
            width, dense_width = widths[head], site.head_dims[head]
            if head in bases:
                q, k = bases[head]
                for basis, to, start in (
                    (q, row, starts[head]),
                    (k, q_size + row, site.size + starts[head]),
                ):
                    rows = dense[start : start + dense_width]
                    reduced[to : to + width] = basis[:, :width].T @ rows
            row += width
        values[f"{attention.qkv}.{name}"] = reduced
    return values
