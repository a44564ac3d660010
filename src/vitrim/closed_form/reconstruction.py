"""Closed-form changes to the kept weights that make up for what a plan removes.

With x_P the removed and x_S the kept inputs of a Linear y = W x + b, over the calibration images:

    bias     b += W_P mean_P                                            (VBP, ICCV 2025)
    ridge    x_P ~ B x_S + c;  W_S += W_P B,  b += W_P c                (CORP, arXiv 2602.05243)

For queries and keys there is no such layer: bias does nothing, and ridge takes the product of the
kept size that comes nearest to the dense logits (`criteria.query_key_spectrum`), whichever dims the
plan names in a head: only their number counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitrim.closed_form.importance import Moments, query_key_moments, query_key_spectrum
from vitrim.closed_form.moments import MomentsError
from vitrim.network.structure import Attention, Layer, Structure
from vitrim.network.survivors import Survivors, index_of, removed_of, resolve, widths_of
from vitrim.plan import Plan

Compensation = Literal["none", "bias", "ridge", "sequential"]
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation)


def compensated(
    net: nn.Module,
    compact: nn.Module,
    described: Structure,
    plan: Plan,
    moments: Moments,
    *,
    kind: Compensation,
    ridge: float,
) -> dict[str, Tensor]:
    """Return new values of parameters of `compact`, by name.

    Args:
        net: the dense network.
        compact: `cut(net, plan)`.
        described: the structure of `net`.
        plan: what was cut.
        moments: of the layers whose inputs were cut, by layer; of queries and keys, by site.
        kind: see above; `sequential` is `ridge` here, and goes on where the images are.
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
            columns, offset = _folded(
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
            values |= _smaller_product(net, compact, described, attention, survivors, moments)
    return {name: value.to(compact.get_parameter(name).dtype) for name, value in values.items()}


def _folded(
    layer: Layer, weight: Tensor, kept: Tensor, moments: Moments, ridge: float, *, biased: bool
) -> tuple[Tensor, Tensor]:
    """Return the new weight (out, kept) and what its bias gains (out,); without ridge, B is 0."""
    found = moments.get(layer.name)
    if found is None or not bool(torch.isfinite(found["mean"]).all()):
        raise MomentsError(f"{layer.name}: there are no finite moments of its inputs")
    gone = removed_of(weight.shape[1], kept).nonzero()[:, 0]
    mean = found["mean"].double()
    removed = weight[:, gone]
    if not ridge:
        return weight[:, kept], removed @ mean[gone]
    cov = found["cov"]
    if not biased:  # no constant: the regression goes through the origin
        cov = cov + torch.outer(mean, mean).to(cov)
    rows = cov.index_select(0, kept)
    inputs, cross = (rows.index_select(1, units).double() for units in (kept, gone))
    taken = regress(inputs, cross @ removed.T, ridge)
    return weight[:, kept] + taken.T, removed @ mean[gone] - taken.T @ mean[kept]


def fitted(
    found: Mapping[str, Tensor], n_inputs: int, ridge: float, *, biased: bool
) -> tuple[Tensor, Tensor]:
    """Return the ridge solution of targets by inputs: weight (targets, inputs) and bias (targets,).

    Args:
        found: finished moments of rows with the inputs first and the targets behind them.
        n_inputs: how many of the numbers are inputs.
        ridge: relative to the inputs' mean variance, see `regress`.
        biased: whether the bias will be used; without it the regression goes through the origin.
    """
    cov, mean = found["cov"].double(), found["mean"]
    if not biased:
        cov = cov + torch.outer(mean, mean)
    weight = regress(cov[:n_inputs, :n_inputs], cov[:n_inputs, n_inputs:], ridge).T
    return weight, mean[n_inputs:] - weight @ mean[:n_inputs]


def regress(cov: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return the ridge solution (C + ridge mean(diag C) I)^-1 X, zero where nothing varies.

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
    values, vectors = torch.linalg.eigh(ridged)  # a ridge below rounding
    found: Tensor = vectors @ ((vectors.T @ cross) / values.clamp_min(level)[:, None])
    return found


def _smaller_product(
    net: nn.Module,
    compact: nn.Module,
    described: Structure,
    attention: Attention,
    survivors: Survivors,
    moments: Moments,
) -> dict[str, Tensor]:
    """Return the qkv layer with the nearest smaller product in every head that lost dims."""
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
    found = moments[attention.qk]
    bases = {head: query_key_spectrum(*query_key_moments(found, head))[0] for head in narrowed}
    values = {}
    for name, whole in net.get_submodule(attention.qkv).named_parameters():
        dense = whole.detach().double()
        dense = dense[:, columns] if name == "weight" else dense
        small = compact.get_parameter(f"{attention.qkv}.{name}").detach().double().clone()
        at, q_size = 0, sum(widths[head] for head in heads)
        for head in heads:
            width, full = widths[head], site.head_dims[head]
            if head in bases:
                q, k = bases[head]
                for basis, to, start in (
                    (q, at, starts[head]),
                    (k, q_size + at, site.size + starts[head]),
                ):
                    small[to : to + width] = basis[:, :width].T @ dense[start : start + full]
            at += width
        values[f"{attention.qkv}.{name}"] = small
    return values
