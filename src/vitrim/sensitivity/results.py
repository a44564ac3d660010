"""What the scorer keeps: losses, bases, moments and measurements, as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vitrim.closed_form.importance import consumer_of
from vitrim.network.structure import blocks_of
from vitrim.sensitivity.parts import Parts
from vitrim.sensitivity.predict import Prediction, layer_inputs, layer_metric, scaled
from vitrim.sensitivity.probes import Probe
from vitrim.sensitivity.rotate import bases_of
from vitrim.sensitivity.settings import LossRidges
from vitrim.sensitivity.statistics import Statistics

PROBE_KINDS = ("hidden", "qk", "v", "ranks", "branches")
_LEAST = 1e-12  # of a loss, where a ratio of two is taken

Measured = Sequence[tuple[Probe, float]]
"""Probes and the losses that were measured for them."""


def result_names(parts: Parts) -> Iterator[str]:
    """Iterate over the names of all tensors that `results` returns."""
    for site in parts.sites:
        yield f"{site.name}.losses"
        if site.kind != "hidden":
            yield f"{site.name}.rows"
            yield f"{site.name}.columns"
        if site.kind != "qk":
            yield f"{consumer_of(parts.described, site.name).name}.mean"
        if site.kind == "hidden":
            yield f"{consumer_of(parts.described, site.name).name}.cov"
    read = {consumer_of(parts.described, s.name).name for s in parts.sites if s.kind != "qk"}
    for layer in parts.layers:
        yield from (f"{layer.name}.{name}" for name in ("losses", "metric", "outputs"))
        if layer.name not in read:
            yield f"{layer.name}.mean"
    yield from ("network.branches", "network.int8", "network.probes")


def items_of(parts: Parts) -> list[str]:
    """Return the names of all that is measured, by which `network.probes` counts."""
    sites = [site.name for site in parts.sites]
    return [*sites, *(layer.name for layer in parts.layers), *branch_names(parts)]


def branch_names(parts: Parts) -> list[str]:
    """Return the names of what can be dropped: branches, and blocks that have several."""
    if not parts.drops:
        return []
    return [
        name
        for block, names in blocks_of(parts.described).items()
        for name in (*names, *([block] if len(names) > 1 else []))
    ]


def results(
    net: nn.Module,
    parts: Parts,
    statistics: Statistics,
    prediction: Prediction,
    measured: Measured,
    ridges: LossRidges,
) -> dict[str, Tensor]:
    """Return the tensors named by `result_names`, float32 but for losses."""
    found: dict[str, Tensor] = {}
    for name, losses in prediction.losses.items():
        points = [
            (probe.share, max(loss, _LEAST) / max(probe.predicted, _LEAST))
            for probe, loss in measured
            if probe.site == name and probe.kind != "branches"
        ]
        found[f"{name}.losses"] = scaled(losses, points)
    for name, rotations in prediction.rotations.items():
        rows, columns = bases_of([(rotation.rows, rotation.columns) for rotation in rotations])
        found[f"{name}.rows"], found[f"{name}.columns"] = rows.float(), columns.float()
    for site in parts.sites:
        if site.kind == "qk":
            continue
        layer = consumer_of(parts.described, site.name).name
        plain = statistics.regression(layer)
        found[f"{layer}.mean"] = plain["mean"].float()
        if site.kind == "hidden":
            found[f"{layer}.cov"] = plain["cov"].float()
    for layer_ in parts.layers:
        name = layer_.name
        of_layer = statistics.of_layer(name)
        found[f"{name}.metric"] = layer_inputs(net, name, of_layer).float()
        found[f"{name}.outputs"] = layer_metric(net, name, of_layer, ridges).float()
        found[f"{name}.mean"] = statistics.regression(name)["mean"].float()
    losses_of = {probe.site: loss for probe, loss in measured if probe.kind == "branches"}
    names, items = branch_names(parts), items_of(parts)
    found["network.branches"] = _vector([losses_of.get(name, math.inf) for name in names])
    found["network.int8"] = _vector([prediction.int8[name] for name in parts.int8])
    rows_of_table = [
        [PROBE_KINDS.index(p.kind), items.index(p.site), p.share, p.predicted, loss]
        for p, loss in measured
    ]
    found["network.probes"] = torch.tensor(rows_of_table, dtype=torch.float64)
    return found


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def probe_table(parts: Parts, table: Tensor) -> list[dict[str, object]]:
    """Return the measurements as rows for people, from `network.probes`."""
    items = items_of(parts)
    return [
        {
            "kind": PROBE_KINDS[int(kind)],
            "name": items[int(item)],
            "share": round(share, 6),
            "predicted": predicted,
            "measured": measured,
        }
        for kind, item, share, predicted, measured in table.tolist()
    ]
