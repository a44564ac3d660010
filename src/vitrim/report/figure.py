"""Draw the figure of a report: accuracy against strength and against MACs."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from vitrim.report.summary import NAMES, Row, macs_unit, sections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

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
_BY_TARGET: dict[str, Any] = {"markerfacecolor": "white", "linestyle": ":"}
_FAINT: dict[str, Any] = {"linewidth": 0.8, "markersize": 2.5, "alpha": 0.5}
_DENSE: dict[str, Any] = {"color": "0.5", "linestyle": "--", "linewidth": 1.0}
STYLE = {
    **{"font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
}


class Panel(NamedTuple):
    """One panel of the figure: a measure on each axis, and a fainter one on y."""

    x: str
    x_label: str
    y: str
    y_label: str
    faint: str | None = None
    x_size: float = 1.0


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Choose what to draw: accuracy where a run has one, else how much of the network is kept."""
    strength = any(row.mean("strength") is not None for row in rows)
    if all(row.mean("compact.top1") is None for row in rows):
        macs, params = ("kept_macs", "kept MACs (%)"), ("kept_params", "kept parameters (%)")
        both = [Panel("strength", "strength", *macs), Panel("strength", "strength", *params)]
        return both if strength else [Panel(*macs, *params)]
    size, unit = macs_unit(rows)
    accuracy = ("compact.top1", "top-1 accuracy (%)", "cut.top1")
    by_macs = Panel("compact.macs", f"kept MACs per image ({unit})", *accuracy, x_size=size)
    return [Panel("strength", "strength", *accuracy), by_macs] if strength else [by_macs]


def labelled(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each series under its method, and under what else tells series apart."""
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


def draw(rows: Sequence[Row], chosen: Sequence[Panel] = ()) -> bytes:
    """Return the figure as a PNG: a line per series, error bars of one standard deviation.

    Its panels are those `chosen`, or those that suit the rows: where some have an accuracy, the
    others are left out.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    if not chosen:
        rows = [row for row in rows if row.spreads["compact.top1"]] or rows
        chosen = panels(rows)
    accuracy = chosen[0].faint is not None
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(7.0, 3.4), layout="constrained")
        grid = figure.subplots(1, len(chosen), squeeze=False, sharey=accuracy)[0]
        for axes, panel in zip(grid, chosen, strict=True):
            _draw_panel(axes, panel, rows)
        if accuracy:
            _scale(grid, rows)
        handles = _legend(rows, accuracy=accuracy)
        return png(figure, handles)


def png(figure: Figure, handles: Sequence[Line2D]) -> bytes:
    """Return the figure as a PNG, its legend above it."""
    content = io.BytesIO()
    columns = _columns([str(handle.get_label()) for handle in handles])
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may have dollars in it
    figure.savefig(content, format="png", dpi=300, metadata={"Software": None})
    return content.getvalue()


def frame(axes: Axes, x_label: str, y_label: str) -> None:
    """Name the axes and draw a faint grid below what follows."""
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_panel(axes: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    frame(axes, panel.x_label, panel.y_label)
    wide = [row.record["dense.macs"] for row in rows]
    if panel.x == "strength":
        axes.set(xlim=(-0.25, 5.25), xticks=range(6))
    elif panel.x == "compact.macs" and max(wide) > 20 * min(wide):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    for index, series in enumerate(labelled(rows).values()):
        for by_target, part in groupby(series, key=_target_metric):
            group = list(part)
            look = line_look(index) | (_BY_TARGET if by_target else {})
            if panel.faint and (points := line_of(group, panel, panel.faint)):
                axes.plot(points.x, points.y, **look | _FAINT, zorder=1.5)
            if points := line_of(group, panel, panel.y):
                axes.errorbar(points.x, points.y, points.std, **look, capsize=2, elinewidth=0.8)


def _target_metric(row: Row) -> str:
    return row.record["target.metric"] if row.record["strength"] is None else ""


class Points(NamedTuple):
    """A line of the figure from left to right; a spread that is not known is nan."""

    x: list[float]
    y: list[float]
    std: list[float]


def line_of(rows: Sequence[Row], panel: Panel, y: str) -> Points | None:
    """Return the line of one series in one panel, or None where nothing was measured."""
    found = [
        (x / panel.x_size, value.mean, math.nan if value.std is None else value.std)
        for row in rows
        if (x := row.mean(panel.x)) is not None and (value := row.spreads[y])
    ]
    return Points(*map(list, zip(*sorted(found), strict=True))) if found else None


def line_look(index: int) -> dict[str, Any]:
    """Return colour and marker of the line with this number, as matplotlib has them."""
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}


class Window(NamedTuple):
    """The accuracies that the figure spans: what lies from `low` to `knee` is squeezed."""

    low: float
    knee: float
    high: float


def window(rows: Sequence[Row]) -> Window:
    """Choose the range of y; squeeze accuracies before recovery that would flatten the rest."""
    finals = [final for row in rows if (final := row.spreads["compact.top1"])]
    cuts = [mean for row in rows if (mean := row.mean("cut.top1")) is not None]
    low = min(final.mean - (final.std or 0) for final in finals)
    high = max([final.mean + (final.std or 0) for final in finals] + dense_levels(rows))
    bottom, span = min([low, *cuts]), max(high - low, 1.0)
    margin = 0.06 * span
    if bottom > low - 2 * span:
        return Window(bottom - margin, bottom - margin, high + margin)
    return Window(bottom - 0.06 * (high - bottom), low - 2 * margin, high + margin)


def dense_levels(rows: Sequence[Row]) -> list[float]:
    """Return the dense accuracy per model and data set, each row counting with its seeds."""
    parts = [[row.spreads["dense.top1"] for row in part] for part in sections(rows).values()]
    known = [[value for value in part if value] for part in parts]
    return [
        sum(value.mean * value.n for value in part) / sum(value.n for value in part)
        for part in known
        if part
    ]


def _scale(grid: Sequence[Axes], rows: Sequence[Row]) -> None:
    low, knee, high = window(rows)
    grid[0].set_ylim(low, high)
    for axes in grid:
        axes.label_outer()
        for level in dense_levels(rows):
            axes.axhline(level, **_DENSE, zorder=1.4)
    if knee > low:
        _squeeze(grid, low, knee, high)


def _squeeze(grid: Sequence[Axes], low: float, knee: float, high: float) -> None:
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    values, places = [low, knee, high], [0.0, 0.3, 1.0]
    there, back = (lambda y: np.interp(y, values, places)), (lambda y: np.interp(y, places, values))
    grid[0].set_yscale("function", functions=(there, back))
    last, steps = knee - 0.2 * (knee - low), [1, 2, 5, 10]
    below = MaxNLocator(3, steps=steps).tick_values(low, last)
    above = MaxNLocator(6, steps=steps).tick_values(knee, high)
    ticks = [tick for tick in (*below, *above) if low <= tick <= last or knee <= tick <= high]
    grid[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for axes in grid:
        axes.axhline(knee, color="0.6", linewidth=0.6, linestyle=":")
        for shift in (-0.012, 0.012):  # two slashes across the axis, where its scale changes
            slash = Line2D([0], [places[1] + shift], color="black", clip_on=False)
            slash.set(transform=axes.transAxes, marker=[(-1, -0.6), (1, 0.6)], markersize=7)
            axes.add_artist(slash)


def _legend(rows: Sequence[Row], *, accuracy: bool) -> list[Line2D]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=label, **line_look(i)) for i, label in enumerate(labelled(rows))
    ]
    if any(_target_metric(row) for row in rows):
        look = line_look(0) | _BY_TARGET | {"color": "0.4"}
        handles.append(Line2D([], [], label="by target", **look))
    if accuracy and any(row.mean("cut.top1") is not None for row in rows):
        look = line_look(0) | _FAINT | {"color": "0.4"}
        handles.append(Line2D([], [], label="before recovery", **look))
    if accuracy and dense_levels(rows):
        handles.append(Line2D([], [], label="dense", **_DENSE))
    return handles


def _columns(labels: Sequence[str]) -> int:
    widths = [len(label) + 9 for label in labels]  # the nine stand for the line beside a label
    return len(labels) if sum(widths) <= 105 else max(1, 105 // max(widths))
