"""Predicted losses of a network's sites, layers and branches, and the probes that measure some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from vitrim.closed_form.importance import consumer_of
from vitrim.network.decompose import (
    Spectrum,
    decompose,
    output_errors,
    output_metric,
    truncated,
)
from vitrim.network.int8_linear import fake_int8
from vitrim.network.structure import Attention, Layer, Site, Structure, blocks_of
from vitrim.network.survivors import head_of
from vitrim.sensitivity import edits
from vitrim.sensitivity.losses import (
    Rotation,
    effects_of,
    query_key_rotation,
    unit_losses,
    value_rotation,
)
from vitrim.sensitivity.parts import Parts
from vitrim.sensitivity.probes import Probe, rounded
from vitrim.sensitivity.settings import LossRidges, Scaling
from vitrim.sensitivity.statistics import Statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What removing units is predicted to cost, and the bases in which directions go.

    Args:
        losses: by site, (units,); by layer of which ranks are chosen, (components,).
        int8: by layer.
        rotations: by query-key or value site, of every head.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    int8: dict[str, float] = field(default_factory=dict)
    rotations: dict[str, list[Rotation]] = field(default_factory=dict)


def predict(
    net: nn.Module, parts: Parts, statistics: Statistics, *, ridges: LossRidges, unit: float
) -> Prediction:
    """Return predicted losses.

    Args:
        net: the dense network.
        parts: what of it may go.
        statistics: finished.
        ridges: of the methods.
        unit: what turns E<s, dz>^2 into the divergence.
    """
    found, described = Prediction(), parts.described
    attentions = {name: a for a in described.attentions for name in (a.qk, a.v)}
    for site in parts.sites:
        match site.kind:
            case "qk":
                rotations = _query_keys(statistics, attentions[site.name], site)
            case "v":
                rotations = _values(net, described, statistics, site, ridges)
            case _:
                reader = consumer_of(described, site.name).name
                of_layer = statistics.of_layer(reader)
                effects = layer_effects(net, reader, of_layer, ridges.gradient_shrinkage)
                losses = unit_losses(effects, of_layer["cov"], ridges.order)
                found.losses[site.name] = losses * unit
                continue
        found.rotations[site.name] = rotations
        found.losses[site.name] = torch.cat([r.losses for r in rotations]) * unit
    for layer in parts.layers:
        of_layer = statistics.of_layer(layer.name)
        spectrum = layer_spectrum(net, layer.name, of_layer, ridges)
        found.losses[layer.name] = spectrum.energy * unit
    for name in parts.int8:
        of_layer = statistics.of_layer(name)
        lost = weight_of(net, name) - fake_int8(weight_of(net, name))
        errors = output_errors(lost, of_layer["cov"])
        found.int8[name] = float(of_layer["squares"] @ errors) * unit
    return found


def weight_of(net: nn.Module, layer: str) -> Tensor:
    """Return the weight of a Linear, (out, in), float64."""
    return net.get_submodule(layer).get_parameter("weight").detach().double().cpu()


def layer_metric(
    net: nn.Module, layer: str, of_layer: Mapping[str, Tensor], ridges: LossRidges
) -> Tensor:
    """Return G of a layer (out, out), or W^T G W (in, in) if that is smaller, shrunk."""
    squares = of_layer["squares"]
    squares = squares if bool(squares.any()) else torch.ones_like(squares)
    metric = output_metric(
        weight_of(net, layer), of_layer["products"], squares, ridges.gradient_shrinkage
    )
    assert metric is not None
    return metric


def layer_spectrum(
    net: nn.Module, layer: str, of_layer: Mapping[str, Tensor], ridges: LossRidges
) -> Spectrum:
    """Return the factors of a layer for all ranks, and the loss of each component."""
    outputs, inputs = layer_metric(net, layer, of_layer, ridges), layer_inputs(net, layer, of_layer)
    return decompose(weight_of(net, layer), inputs, ridge=ridges.metric, outputs=outputs)


def layer_inputs(net: nn.Module, layer: str, of_layer: Mapping[str, Tensor]) -> Tensor:
    """Return C of a layer (in, in); with the mean where no bias can take over what it loses."""
    if net.get_submodule(layer).bias is not None:
        return of_layer["cov"]
    return of_layer["cov"] + of_layer["scale"] * torch.outer(of_layer["mean"], of_layer["mean"])


def layer_effects(
    net: nn.Module, layer: str, of_layer: Mapping[str, Tensor], shrinkage: float
) -> Tensor:
    """Return what a change of each input of a layer does to the decision, see `effects_of`."""
    return effects_of(weight_of(net, layer), of_layer["products"], of_layer["squares"], shrinkage)


def _query_keys(statistics: Statistics, attention: Attention, site: Site) -> list[Rotation]:
    rotations = []
    for head in range(len(site.head_dims)):
        q, k, weight = statistics.of_head(attention.qk, head)
        rotations.append(query_key_rotation(q, k, weight * statistics.dense_width(attention)))
    return rotations


def _values(
    net: nn.Module, described: Structure, statistics: Statistics, site: Site, ridges: LossRidges
) -> list[Rotation]:
    layer = consumer_of(described, site.name).name
    of_layer, rotations, start = statistics.of_layer(layer), [], 0
    effects = layer_effects(net, layer, of_layer, ridges.gradient_shrinkage)
    for width in site.head_dims:
        columns = slice(start, start + width)
        rotations.append(value_rotation(effects[columns], of_layer["cov"][columns, columns]))
        start = columns.stop
    return rotations


def removal_order(losses: Tensor) -> Tensor:
    """Return the units of a site in the order in which they go, (n,)."""
    return losses.argsort(stable=True)


def widths_after(site: Site, losses: Tensor, n_removed: int) -> list[int]:
    """Return how many directions each head keeps after the first `n_removed` removals."""
    removed = removal_order(losses)[:n_removed]
    lost = torch.bincount(head_of(site)[removed], minlength=len(site.head_dims))
    return [dim - int(n) for dim, n in zip(site.head_dims, lost, strict=True)]


def probes_of(
    net: nn.Module,
    parts: Parts,
    statistics: Statistics,
    prediction: Prediction,
    scaling: Scaling,
    ridges: LossRidges,
) -> list[Probe]:
    """Return everything that is measured."""
    if not scaling.images:
        return []
    probes = chain(
        _unit_probes(net, parts, statistics, prediction, scaling.shares, ridges),
        _rank_probes(net, statistics, prediction, parts.layers, ridges),
        _branch_probes(net, parts.described) if parts.drops else (),
    )
    return [rounded(net, probe) for probe in probes]


def _unit_probes(
    net: nn.Module,
    parts: Parts,
    statistics: Statistics,
    prediction: Prediction,
    shares: Sequence[float],
    ridges: LossRidges,
) -> Iterator[Probe]:
    """Iterate over the removals of shares of every site."""
    described = parts.described
    attentions = {name: a for a in described.attentions for name in (a.qk, a.v)}
    for site in parts.sites:
        losses = prediction.losses[site.name]
        for share in shares:
            n = round(share * site.size)
            if not 0 < n < site.size:
                continue
            predicted = float(losses.sort().values[:n].sum())
            rotations = prediction.rotations.get(site.name, [])
            widths = widths_after(site, losses, n) if rotations else []
            if site.kind == "qk":
                attention = attentions[site.name]
                values = edits.without_query_keys(net, attention.qkv, rotations, widths)
                branch = attention.branch
            else:
                layer = consumer_of(described, site.name)
                plain, branch = statistics.regression(layer.name), layer.branch
                if rotations:
                    values = edits.without_values(net, layer.name, rotations, widths, plain["mean"])
                else:
                    removed = removal_order(losses)[:n]
                    values = edits.without_units(net, layer.name, removed, plain, ridges.fold)
            yield Probe(site.kind, site.name, share, (branch,), values, predicted)


def _branch_probes(net: nn.Module, described: Structure) -> Iterator[Probe]:
    """Iterate over the removals of whole branches, and of blocks that have several."""
    ends = {branch.name: branch.ends for branch in described.branches}
    for block, names in blocks_of(described).items():
        groups: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in names]
        groups += [(block, tuple(names))] if len(names) > 1 else []
        for name, branches in groups:
            values: dict[str, Tensor] = {}
            for branch in branches:
                values |= edits.without_branch(net, ends[branch])
            yield Probe("branches", name, 1.0, branches, values, 0.0)


def _rank_probes(
    net: nn.Module,
    statistics: Statistics,
    prediction: Prediction,
    layers: Sequence[Layer],
    ridges: LossRidges,
) -> Iterator[Probe]:
    """Iterate over the factorisations of layers, at half of their break-even rank."""
    for layer in layers:
        weight, of_layer = weight_of(net, layer.name), statistics.of_layer(layer.name)
        mean = statistics.regression(layer.name)["mean"]
        rank = max(1, weight.numel() // (2 * sum(weight.shape)))
        spectrum = layer_spectrum(net, layer.name, of_layer, ridges)
        values = edits.with_weight(net, layer.name, truncated(spectrum, rank), mean)
        predicted = float(prediction.losses[layer.name][rank:].sum())
        share = 1 - rank / len(spectrum.energy)
        yield Probe("ranks", layer.name, share, (layer.branch,), values, predicted)


def scaled(losses: Tensor, points: Sequence[tuple[float, float]]) -> Tensor:
    """Return losses whose sums are `ratio` times as large after a share of the units, (n,).

    Args:
        losses: of the units of a site, (n,).
        points: shares of the units that go first, and the ratio of measured to predicted loss
            there, above 0; between them the ratio is interpolated, by its logarithm.
    """
    if not points:
        return losses
    order = removal_order(losses)
    sums = losses[order].double().cumsum(0)
    at = torch.arange(1, len(losses) + 1, dtype=torch.float64) / len(losses)
    shares = torch.tensor([share for share, _ in points], dtype=torch.float64)
    logs = torch.tensor([ratio for _, ratio in points], dtype=torch.float64).log()
    totals = (sums * _interpolated(at, shares, logs).exp()).cummax(0).values
    steps = rising(totals.diff(prepend=totals.new_zeros(1)))
    return torch.empty_like(steps).index_copy_(0, order, steps)


def rising(steps: Tensor) -> Tensor:
    """Return the slopes of the lower convex hull of the sums of `steps`, (n,), strictly rising.

    >>> rising(torch.tensor([1.0, 3.0, 1.0])).round(decimals=6).tolist()
    [1.0, 2.0, 2.0]
    """
    sums: list[float] = []
    counts: list[int] = []
    for step in steps.tolist():
        total, count = step, 1
        while counts and sums[-1] * count >= total * counts[-1]:
            total, count = total + sums.pop(), count + counts.pop()
        sums.append(total)
        counts.append(count)
    slopes = torch.tensor(
        [total / count for total, count in zip(sums, counts, strict=True) for _ in range(count)],
        dtype=torch.float64,
    )
    floor = 1e-12 * float(slopes.abs().max()) + 1e-300 if len(slopes) else 0.0
    return slopes + floor * torch.arange(len(slopes), dtype=torch.float64)


def _interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Return y at x on the line through the points, constant outside of them."""
    if len(xs) == 1:
        return ys.expand(len(x))
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    share = ((x - xs[left]) / (xs[right] - xs[left])).clamp(0, 1)
    return ys[left] + share * (ys[right] - ys[left])
