"""Draw the figure of a report: accuracy after and before recovery, by strength and by MACs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vitrim.deploy.runfolder import CONTROL
from vitrim.files import escape
from vitrim.report.layout import SCREEN, Layout, with_legend
from vitrim.report.summary import NAMES, Row, macs_unit, sections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Look = dict[str, Any]
"""Keyword arguments of matplotlib for one line."""
_Shared = Literal["none", "row", "col"]

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe-Ito
_MARKERS = "osD^vPX*"
_BY_TARGET: Look = {"markerfacecolor": "white", "linestyle": ":"}
_DENSE: Look = {"color": "0.5", "linestyle": "--", "linewidth": 1.0}
_CONTROL: Look = {"color": "0.2", "linestyle": "-.", "linewidth": 1.0}
ACCURACY = ("compact.top1", "top-1 accuracy (%)")
_BEFORE_RECOVERY = ("cut.top1", "top-1 before recovery (%)")


class Panel(NamedTuple):
    """One panel of the figure: a measure and its label on each axis."""

    x: str
    x_label: str
    y: str
    y_label: str
    x_size: float = 1.0


class Points(NamedTuple):
    """A line of the figure from left to right; a spread that is not known is nan."""

    x: list[float]
    y: list[float]
    std: list[float]


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Choose what to draw: accuracy where a run has one, else how much of the network is kept."""
    strength = any(row.mean("strength") is not None for row in rows)
    if all(row.mean("compact.top1") is None for row in rows):
        macs, params = ("kept_macs", "kept MACs (%)"), ("kept_params", "kept parameters (%)")
        both = [Panel("strength", "strength", *macs), Panel("strength", "strength", *params)]
        return both if strength else [Panel(*macs, *params)]
    size, unit = macs_unit(rows)
    by_macs = Panel("compact.macs", f"kept MACs per image ({unit})", *ACCURACY, x_size=size)
    return [Panel("strength", "strength", *ACCURACY), by_macs] if strength else [by_macs]


def labelled(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each series under its method, and under what else distinguishes it."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(row.record["series"], []).append(row)
    parts = [NAMES[0], *(key for key in NAMES[1:] if len({row.record[key] for row in rows}) > 1)]
    labels = {
        name: ", ".join(part[0].record[key] for key in parts) for name, part in series.items()
    }
    counts = Counter(labels.values())
    return {
        label if counts[label] == 1 else f"{label}, {name.rsplit('-')[-1]}": series[name]
        for name, label in labels.items()
    }


def draw(rows: Sequence[Row], chosen: Sequence[Panel] = (), layout: Layout = SCREEN) -> Figure:
    """Return the figure: a line per series, error bars of one standard deviation.

    Its panels are those `chosen`, or those that suit the rows: where some have an accuracy, the
    others are omitted. Accuracies before recovery are in panels of their own below, with their own
    axis: they can be far lower.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    if not chosen:
        rows = [row for row in rows if row.spreads["compact.top1"]] or rows
        chosen = panels(rows)
    accuracy = chosen[0].y == ACCURACY[0]
    shown = [*chosen, *(_before_recovery(chosen, rows) if accuracy else [])]
    n_columns = min(layout.columns, len(chosen))
    n_rows = -(-len(shown) // n_columns)
    one_below_another = n_columns < len(chosen)
    with style.context(["default", layout.style]):
        size = (layout.width, 1.2 + 2.2 * n_rows)
        figure = Figure(figsize=size, layout="constrained")
        share_x: _Shared = "none" if one_below_another else "col"
        share_y: _Shared = "row" if accuracy else "none"
        grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=share_x, sharey=share_y)
        for axes, panel in zip(grid.flat, shown, strict=True):
            _draw_panel(axes, panel, rows)
            if accuracy and not one_below_another:
                axes.label_outer()
        return with_legend(figure, _legend(rows, accuracy=accuracy), layout)


def _before_recovery(chosen: Sequence[Panel], rows: Sequence[Row]) -> list[Panel]:
    """Return the same panels with the accuracy right after the cut, if any row has one."""
    y, label = _BEFORE_RECOVERY
    if all(row.mean(y) is None for row in rows):
        return []
    return [panel._replace(y=y, y_label=label) for panel in chosen]


def frame(axes: Axes, x_label: str, y_label: str) -> None:
    """Label the axes and draw a faint grid in the background."""
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_panel(axes: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    frame(axes, panel.x_label, panel.y_label)
    dense_macs = [row.record["dense.macs"] for row in rows]
    if panel.x == "strength":
        axes.set(xlim=(-0.25, 5.25), xticks=range(6))
    elif panel.x == "compact.macs" and max(dense_macs) > 20 * min(dense_macs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    for index, series in enumerate(labelled(rows).values()):
        for by_target, part in groupby(series, key=_target_metric):
            look = line_look(index) | (_BY_TARGET if by_target else {})
            if points := line_of([*part], panel, panel.y):
                look |= {"capsize": 2, "elinewidth": 0.8, "clip_on": False}
                axes.errorbar(points.x, points.y, points.std, **look)
    if panel.y in (ACCURACY[0], _BEFORE_RECOVERY[0]):
        for level in dense_levels(rows):
            axes.axhline(level, **_DENSE, zorder=1.4)
        for level in control_levels(rows):
            axes.axhline(level, **_CONTROL, zorder=1.4)


def _target_metric(row: Row) -> str:
    return row.record["target.metric"] if row.record["strength"] is None else ""


def line_of(rows: Sequence[Row], panel: Panel, y: str) -> Points | None:
    """Return the line of one series in one panel, or None where nothing was measured."""
    points = [
        (x / panel.x_size, value.mean, math.nan if value.std is None else value.std)
        for row in rows
        if (x := row.mean(panel.x)) is not None and (value := row.spreads[y])
    ]
    return Points(*map(list, zip(*sorted(points), strict=True))) if points else None


def line_look(index: int) -> Look:
    """Return colour and marker of the line with this number, as matplotlib takes them."""
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}


def dense_levels(rows: Sequence[Row]) -> list[float]:
    """Return the dense accuracy per model and data set, each row weighted by its seeds."""
    return _levels([*sections(rows).values()], "dense.top1")


def control_levels(rows: Sequence[Row]) -> list[float]:
    """Return the accuracy of the dense network that was trained as long, per series with one."""
    return _levels([*labelled(rows).values()], CONTROL)


def _levels(groups: Sequence[Sequence[Row]], measure: str) -> list[float]:
    """Return the mean of each group in which it was measured, each row weighted by its seeds."""
    parts = [[row.spreads.get(measure) for row in part] for part in groups]
    known = [[value for value in part if value] for part in parts]
    return [
        sum(value.mean * value.n for value in part) / sum(value.n for value in part)
        for part in known
        if part
    ]


def _legend(rows: Sequence[Row], *, accuracy: bool) -> list[Line2D]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=escape.figure(label), **line_look(i))
        for i, label in enumerate(labelled(rows))
    ]
    if any(_target_metric(row) for row in rows):
        look = line_look(0) | _BY_TARGET | {"color": "0.4"}
        handles.append(Line2D([], [], label="by target", **look))
    if accuracy and dense_levels(rows):
        handles.append(Line2D([], [], label="dense", **_DENSE))
    if accuracy and control_levels(rows):
        handles.append(Line2D([], [], label="dense, trained as long", **_CONTROL))
    return handles
