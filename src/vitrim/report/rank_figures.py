"""Draw the figures of the mixed-rank paper (arXiv 2402.06004) from the runs of a report.

energy is its figure 1, ranks its figure 2, error its figure 3. The first and the last
need the curves that a run writes to diagnostics.json
(`vitrim.method.mixed_rank.metric.rank_curves`); a panel shows the first run of a series. Our
addition: the error of the truncated SVD next to that of the run's decomposition.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from operator import lt
from typing import TYPE_CHECKING, NamedTuple

from vitrim.deploy.runfolder import Record, Run, RunFolderError, read_diagnostic
from vitrim.files import escape
from vitrim.report.figure import (
    ACCURACY,
    Look,
    Panel,
    draw,
    frame,
    labelled,
    line_look,
    line_of,
)
from vitrim.report.layout import SCREEN, Layout, title_width, with_legend
from vitrim.report.summary import NAMES, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 10_000
MAX_CHARTS = 12
_KEYS = ("rank", "energy", "error", "plain_error")
_LARGEST = {"energy": 1.0, "error": 1e6, "plain_error": 1e6}
_NAME = re.compile(r"[\w.-]{1,256}", re.ASCII)  # nothing that a label would take for mathematics
_MATRIX = re.compile(r"((?:[\w-]+\.)*blocks\.\d{1,9})\.([\w.-]+)", re.ASCII)
_RANKS = Panel("kept_params", "kept parameters (%)", *ACCURACY)

Curves = Mapping[str, Mapping[str, Sequence[float]]]


class RunCurves(NamedTuple):
    """The curves of one run, by layer, with its record and the metric of its decompositions."""

    record: Record
    decomposition: str
    curves: Curves


class Line(NamedTuple):
    """A line of a chart from left to right; a reference is dashed."""

    label: str
    x: list[float]
    y: list[float]
    reference: bool = False


class Chart(NamedTuple):
    """One panel: a title and lines; those with the same label have the same colour."""

    title: str
    lines: list[Line]


def figures(runs: Sequence[Run], rows: Sequence[Row], layout: Layout = SCREEN) -> dict[str, Figure]:
    """Return the figures for which these runs have data, by name.

    Raises:
        RunFolderError: curves that no run of vitrim wrote.
    """
    curves = [of_run for run in runs if (of_run := read_curves(run))]
    pictures = {}
    if energy := energy_charts(curves):
        labels = ("share of the full rank (%)", "energy kept (%)")
        pictures["energy"] = _draw(energy, labels, layout)
    if ranks := rank_rows(rows):
        pictures["ranks"] = draw(ranks, [_RANKS], layout)
    if error := error_charts(curves):
        pictures["error"] = _draw(error, ("rank", "normalised output error"), layout)
    return pictures


def read_curves(run: Run) -> RunCurves | None:
    """Return the curves that a run saved, or None where there are none.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    diagnostic = read_diagnostic(run.folder, "curves")
    if diagnostic is None or not diagnostic.value:
        return None
    where, curves = diagnostic.where, diagnostic.value
    if not isinstance(curves, dict):
        raise RunFolderError(f"{where}: expected an object, by layer")
    for name, curve in curves.items():
        if not _NAME.fullmatch(name) or not _fits(curve):
            raise RunFolderError(
                f"{where}: {reprlib.repr(name)}: expected the path of a layer, and equally long "
                f"lists of numbers in range, ranks rising: {', '.join(_KEYS)}"
            )
    name = diagnostic.notes.get("decomposition")
    decomposition = name if isinstance(name, str) and _NAME.fullmatch(name) else "decomposition"
    return RunCurves(run.record, decomposition, curves)


def _fits(curve: object) -> bool:
    if not isinstance(curve, dict) or not curve.keys() >= {*_KEYS}:
        return False
    rank = curve["rank"]
    if not isinstance(rank, list) or not 0 < len(rank) <= MAX_POINTS or {*map(type, rank)} != {int}:
        return False
    return (
        rank[0] > 0
        and rank[-1] <= 2**31
        and all(map(lt, rank, rank[1:]))
        and all(_in_range(curve[key], len(rank), largest) for key, largest in _LARGEST.items())
    )


def _in_range(values: object, length: int, largest: float) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(type(value) in (int, float) and 0 <= value <= largest for value in values)
    )


def energy_charts(curves: Sequence[RunCurves]) -> list[Chart]:
    """Return what every matrix of the first block keeps, in percent; each network once."""
    charts = []
    for run in _first_of_series(curves):
        matrices = [match for name in run.curves if (match := _MATRIX.fullmatch(name))]
        if not matrices:
            continue
        first = min((match[1] for match in matrices), key=_natural)
        lines = [
            _share_line(match[2], run.curves[match[0]]) for match in matrices if match[1] == first
        ]
        model, data = (run.record[key] for key in NAMES[1:])
        charts.append(Chart(f"{model} on {data}, seed {run.record['seed']}: {first}", lines))
    return [chart for i, chart in enumerate(charts) if chart not in charts[:i]]


def _share_line(label: str, curve: Mapping[str, Sequence[float]]) -> Line:
    full = curve["rank"][-1]
    return Line(label, [100 * r / full for r in curve["rank"]], [100 * e for e in curve["energy"]])


def error_charts(curves: Sequence[RunCurves]) -> list[Chart]:
    """Return the output errors of the first, a middle and the last attention projection."""
    runs = _first_of_series(curves)
    names = labelled([Row(run.record, {}) for run in runs])
    titles = {part[0].record["series"]: name for name, part in names.items()}
    charts = []
    for run in runs:
        layers = sorted((n for n in run.curves if n.endswith(".attn.proj")), key=_natural)
        picked = sorted({0, len(layers) // 2, len(layers) - 1}) if layers else []
        lines = [
            Line(layers[i], [*curve["rank"]], [*curve[key]], key == "plain_error")
            for i in picked
            for curve in [run.curves[layers[i]]]
            for key in ("error", "plain_error")
        ]
        title = f"{titles[run.record['series']]}: {run.decomposition}, seed {run.record['seed']}"
        charts += [Chart(title, lines)] if lines else []
    return charts


def rank_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the mixed_rank rows with an accuracy, if any series has two of them or more."""
    with_accuracy = [
        row
        for row in rows
        if row.record["choices.method"] == "mixed_rank" and row.spreads["compact.top1"]
    ]
    lines = [line_of(part, _RANKS, _RANKS.y) for part in labelled(with_accuracy).values()]
    return with_accuracy if any(line and len(line.x) > 1 for line in lines) else []


def _first_of_series(curves: Sequence[RunCurves]) -> list[RunCurves]:
    """Return one run per series: curves do not depend on its strength."""
    return [*{run.record["series"]: run for run in reversed(curves)}.values()][::-1]


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts the numbers in a path by value."""
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in name.split("."))


def _draw(charts: Sequence[Chart], labels_of_axes: tuple[str, str], layout: Layout) -> Figure:
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = charts[:MAX_CHARTS]
    labels = [*dict.fromkeys(line.label for chart in shown for line in chart.lines)]
    looks = {label: line_look(i) | {"markersize": 2.5} for i, label in enumerate(labels)}
    dashed: Look = {"linestyle": "--", "marker": "", "linewidth": 1.0}
    columns = min(layout.columns, len(shown))
    height = -(-len(shown) // columns)
    with style.context(["default", layout.style]):
        figure = Figure(figsize=(layout.width, 0.6 + 2.8 * height), layout="constrained")
        grid = [*figure.subplots(height, columns, squeeze=False, sharey=True).flat]
        for axes, chart in zip(grid, shown, strict=False):
            frame(axes, *labels_of_axes)
            axes.set_title(escape.figure(chart.title, width=title_width(layout, columns)))
            for line in chart.lines:
                look = looks[line.label] | (dashed if line.reference else {})
                axes.plot(line.x, line.y, **look, clip_on=False)  # markers on the axes are whole
            axes.set(xlim=(0, None), ylim=(0, None))
        for axes in grid[len(shown) :]:
            axes.remove()
        handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
        if any(line.reference for chart in shown for line in chart.lines):
            handles.append(Line2D([], [], label="truncated SVD", color="0.4", **dashed))
        if len(charts) > len(shown):
            rest = f"{len(charts) - len(shown)} more not drawn"
            handles.append(Line2D([], [], label=rest, linestyle=""))
        return with_legend(figure, handles, layout)
