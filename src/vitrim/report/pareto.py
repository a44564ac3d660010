"""Pareto fronts: accuracy against MACs, params, megabytes and latency, all methods together.

Networks are compared if they come from one dense network and were evaluated on the same images.
Latencies are compared if batch, device, precision and threads are the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from vitrim.deploy.runfolder import QUANTIZED, SETTINGS
from vitrim.files import escape
from vitrim.report.compare import published_points
from vitrim.report.figure import Look, dense_levels, frame, labelled, line_look
from vitrim.report.layout import SCREEN, Layout, title_width, with_legend
from vitrim.report.summary import NAMES, Row, macs_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MAX_FIGURES = 12
MAX_LATENCIES = 5
"""Panels of latency in one figure, one for each set of conditions."""

MARKS = {"macs": "M", "params": "P", "mb": "S", "latency_ms": "L"}
NOTE = (
    "*front*: no other row of the same dense network and images is at least as accurate and as "
    "small, and better in one of both: by MACs (M), params (P), saved megabytes (S) or latency "
    "under the same conditions (L)."
)
_SAME = ("choices.model", "choices.data", "dataset.content", "evaluated_images")
_DENSE = ("weights.source", "dense.params", "dense.macs")
_LOADED = ("timm", "checkpoint")  # weights that do not depend on the seed
_FILLS = ("none", "left", "top", "right", "bottom")  # of markers, by int8 scheme
_OFF_FRONT = 0.4  # opacity
_LOG_RANGE = 20  # of costs on a linear axis
_FRONT: Look = {"color": "0.35", "linewidth": 1.1}
_DENSE_LOOK: Look = {"color": "black", "marker": "*", "markersize": 8, "linestyle": ""}
_PUBLISHED: Look = {"markerfacecolor": "none", "markersize": 9, "markeredgewidth": 1.2}


class Cost(NamedTuple):
    """What accuracy is compared against; a latency has the conditions that it was measured in."""

    measure: str
    conditions: tuple[object, ...] = ()


class Network(NamedTuple):
    """A point of the figure, with means over seeds.

    Args:
        row: index of its row in the comparison; None for the dense network.
        scheme: of int8, of the networks that `quantize=` saved; empty for others.
        top1: in percent.
        std: of `top1`; None where there is one seed.
        costs: in units of a report.
    """

    row: int | None
    scheme: str
    top1: float
    std: float | None
    costs: Mapping[Cost, float]


class Comparison(NamedTuple):
    """Rows of one dense network, and their networks, the dense one included."""

    rows: list[Row]
    networks: list[Network]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the pairs (cost, accuracy) that no other dominates, by rising cost.

    >>> front([(3, 70), (1, 50), (2, 80), (2, 75), (2, 80), (4, 90)])
    [1, 2, 4, 5]
    """
    found: list[int] = []
    best = float("-inf")
    by_cost = sorted(range(len(points)), key=lambda i: points[i][0])
    for _, equal in groupby(by_cost, key=lambda i: points[i][0]):
        indices = [*equal]
        highest = max(points[i][1] for i in indices)
        if highest > best:
            best = highest
            found += [i for i in indices if points[i][1] == highest]
    return found


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Return the groups of two or more rows with an accuracy that may be compared."""
    groups: list[list[Row]] = []
    for row in rows:
        if row.mean("compact.top1") is None:
            continue
        group = next((g for g in groups if all(_comparable(row, other) for other in g)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return [Comparison(group, _networks(group)) for group in groups if len(group) > 1]


def _comparable(one: Row, other: Row) -> bool:
    """Whether two rows are of one dense network, on the same images.

    Networks that were trained from scratch differ by seed: they are told apart where both have the
    same.
    """
    a, b = one.record, other.record
    if any(a.get(key) != b.get(key) for key in (*_SAME, *_DENSE)):
        return False
    same_weights = a.get("weights.source") in _LOADED or a["seed"] == b["seed"]
    return not same_weights or a.get("weights.sha256") == b.get("weights.sha256")


def _networks(rows: Sequence[Row]) -> list[Network]:
    networks = [*_dense(rows)]
    for index, row in enumerate(rows):
        networks += _of_row(index, row)
    return networks


def _dense(rows: Sequence[Row]) -> list[Network]:
    levels = dense_levels(rows)
    if not levels:
        return []
    known: dict[Cost, list[float]] = {}
    for row in rows:
        for cost, value in _costs(row, "dense.").items():
            known.setdefault(cost, []).append(value)
    costs = {cost: statistics.median(values) for cost, values in known.items()}
    return [Network(None, "", levels[0], None, costs)]


def _of_row(index: int, row: Row) -> list[Network]:
    """Return the compact network of a row, and those in int8, which only have size and latency."""
    found = []
    for scheme in ("", *schemes_of(row)):
        prefix = f"{QUANTIZED[1]}{scheme}." if scheme else "compact."
        accuracy = row.spreads.get(f"{prefix}top1")
        if accuracy is not None:
            costs = _costs(row, prefix)
            found.append(Network(index, scheme, accuracy.mean, accuracy.std, costs))
    return found


def schemes_of(row: Row) -> list[str]:
    """Return the int8 schemes that were measured in the runs of a row."""
    return [
        key.removeprefix(QUANTIZED[1])[:-3]
        for key in row.spreads
        if key.startswith(QUANTIZED[1]) and key.endswith(".mb")
    ]


def _costs(row: Row, prefix: str) -> dict[Cost, float]:
    found = {}
    for measure in MARKS:
        value = row.mean(prefix + measure)
        if value is not None and value > 0:
            is_latency = measure == "latency_ms"
            conditions = tuple(map(row.record.get, SETTINGS)) if is_latency else ()
            found[Cost(measure, conditions)] = value
    return found


def costs_of(compared: Comparison) -> list[Cost]:
    """Return what two or more rows can be compared by; latencies last, of most rows first."""
    rows_with: dict[Cost, set[int]] = {}
    for network in compared.networks:
        for cost in network.costs:
            rows_with.setdefault(cost, set()).update(() if network.row is None else [network.row])
    measures = [*MARKS]
    return sorted(
        (cost for cost, indices in rows_with.items() if len(indices) > 1),
        key=lambda c: (measures.index(c.measure), -len(rows_with[c]), str(c.conditions)),
    )


def on_front(compared: Comparison, cost: Cost) -> list[Network]:
    """Return the networks that no other dominates by `cost`, by rising cost."""
    known = [network for network in compared.networks if cost in network.costs]
    return [known[i] for i in front([(network.costs[cost], network.top1) for network in known])]


def marks(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return for each row the letters of the fronts that it is on, by int8 scheme or "" for float.

    Fronts are those of `comparisons(rows)`.
    """
    found: dict[int, dict[str, str]] = {}
    for compared in comparisons(rows):
        for cost in costs_of(compared):
            for network in on_front(compared, cost):
                if network.row is not None:
                    of_row = found.setdefault(id(compared.rows[network.row]), {})
                    letters = of_row.get(network.scheme, "")
                    of_row[network.scheme] = letters + MARKS[cost.measure]
    return [found.get(id(row), {}) for row in rows]


def captions(rows: Sequence[Row]) -> dict[str, str]:
    """Return what each figure shows, by its name."""
    return {
        name: f"Pareto fronts of {_title(compared)}; a step line joins the networks that no "
        f"other dominates; top-1 is the mean over seeds{_not_drawn(compared)}"
        for name, compared in _named(rows).items()
    }


def _named(rows: Sequence[Row]) -> dict[str, Comparison]:
    return {
        "pareto" if i == 1 else f"pareto-{i}": compared
        for i, compared in enumerate(comparisons(rows)[:MAX_FIGURES], 1)
    }


def _title(compared: Comparison) -> str:
    """Return the model with its weights, and the data set with its number of images."""
    record = compared.rows[0].record
    model, data = (record[key] for key in NAMES[1:])
    weights, images = record.get("weights.name"), record.get("evaluated_images")
    of_weights = f" ({weights})" if weights and weights != model else ""
    return f"{model}{of_weights} on {data}{f', {images:,} images' if images else ''}"


def _latencies(compared: Comparison) -> list[Cost]:
    return [cost for cost in costs_of(compared) if cost.conditions]


def _not_drawn(compared: Comparison) -> str:
    more = len(_latencies(compared)) - MAX_LATENCIES
    return f"; latencies under {more} other conditions are not drawn" if more > 0 else ""


def figures(rows: Sequence[Row], layout: Layout = SCREEN) -> dict[str, Figure]:
    """Return pareto, pareto-2 and so on: a figure for each dense network and set of images."""
    return {name: _draw(compared, layout) for name, compared in _named(rows).items()}


def _draw(compared: Comparison, layout: Layout) -> Figure:
    from matplotlib import style
    from matplotlib.figure import Figure

    hidden = _latencies(compared)[MAX_LATENCIES:]
    shown = [cost for cost in costs_of(compared) if cost not in hidden]
    columns = layout.columns
    height = -(-len(shown) // columns)
    title = escape.figure(_title(compared), width=title_width(layout, 1))
    with style.context(["default", layout.style]):
        figure = Figure(figsize=(layout.width, 1.2 + 2.4 * height), layout="constrained")
        grid = [*figure.subplots(height, columns, squeeze=False, sharey=True).flat]
        for index, (axes, cost) in enumerate(zip(grid, shown, strict=False)):
            _draw_panel(axes, compared, cost)
            axes.set_ylabel("" if index % columns else "top-1 accuracy (%)")
        for axes in grid[len(shown) :]:
            axes.remove()
        return with_legend(figure, _legend(compared), layout, title)


def _draw_panel(axes: Axes, compared: Comparison, cost: Cost) -> None:
    size, label = _unit(compared.rows, cost)
    frame(axes, label, "")
    best = on_front(compared, cost)
    x, y = [network.costs[cost] / size for network in best], [network.top1 for network in best]
    axes.step(x, y, where="post", **_FRONT, zorder=1.5)
    known = [network for network in compared.networks if cost in network.costs]
    looks = [*_looks(compared).values()]
    for network in known:
        look = _look_of(network, compared, looks)
        alpha = 1.0 if any(network is other for other in best) else _OFF_FRONT
        std = math.nan if network.std is None else network.std
        look |= {"alpha": alpha, "capsize": 2, "elinewidth": 0.8, "clip_on": False}
        axes.errorbar([network.costs[cost] / size], [network.top1], [std], **look)
    values = [network.costs[cost] for network in known]
    for point in published_points(compared.rows):
        if cost.measure in point.costs:
            look = looks[_series(compared).index(point.row.record["series"])] | _PUBLISHED
            axes.plot([point.costs[cost.measure] / size], [point.top1], **look)
            values.append(point.costs[cost.measure])
    if max(values) > _LOG_RANGE * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")


def _unit(rows: Sequence[Row], cost: Cost) -> tuple[float, str]:
    """Return the size of the unit of a cost, and the label of its axis."""
    match cost.measure:
        case "macs":
            size, name = macs_unit(rows)
            return size, f"MACs per image ({name})"
        case "params":
            return 1e6, "parameters (M)"
        case "mb":
            return 1.0, "saved network (MB)"
    batch, device, precision, threads = ("-" if c is None else c for c in cost.conditions)
    conditions = f"batch {batch}, {device}, {precision}, threads {threads}"
    return 1.0, f"latency (ms)\n{escape.figure(conditions)}"


def _looks(compared: Comparison) -> dict[str, Look]:
    """Return colour and marker of each series, by its label in the legend."""
    return {
        label: line_look(i) | {"linestyle": "", "markersize": 5}
        for i, label in enumerate(labelled(compared.rows))
    }


def _look_of(network: Network, compared: Comparison, looks: Sequence[Look]) -> Look:
    if network.row is None:
        return dict(_DENSE_LOOK)
    look = looks[_series(compared).index(compared.rows[network.row].record["series"])]
    return look | _fill(compared, network.scheme)


def _series(compared: Comparison) -> list[str]:
    return [*dict.fromkeys(row.record["series"] for row in compared.rows)]


def _fill(compared: Comparison, scheme: str) -> Look:
    """Return how markers of an int8 scheme are filled; those of float are full."""
    if not scheme:
        return {}
    schemes = sorted({network.scheme for network in compared.networks} - {""})
    fill = _FILLS[schemes.index(scheme) % len(_FILLS)]
    return {"fillstyle": fill, "markerfacecoloralt": "white"}


def _legend(compared: Comparison) -> list[Line2D]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=escape.figure(label), **look)
        for label, look in _looks(compared).items()
    ]
    for scheme in sorted({network.scheme for network in compared.networks} - {""}):
        look: Look = line_look(0) | {"linestyle": "", "color": "0.4", **_fill(compared, scheme)}
        handles.append(Line2D([], [], label=escape.figure(scheme), **look))
    if any(network.row is None for network in compared.networks):
        handles.append(Line2D([], [], label="dense", **_DENSE_LOOK))
    if any(point.costs for point in published_points(compared.rows)):
        look = line_look(0) | {"linestyle": "", "color": "0.4", **_PUBLISHED}
        handles.append(Line2D([], [], label="published", **look))
    return [*handles, Line2D([], [], label="Pareto front", **_FRONT)]
