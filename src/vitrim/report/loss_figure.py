"""Predicted against measured losses: what a method found when it measured single edits.

A run writes them to diagnostics.json, under `losses`: rows of a kind of edit, the name of what is
edited (a site, a layer, a branch or a block), the share that is removed, and the loss that was
predicted and measured, in nats of the KL divergence from the dense network. A predicted loss of 0
means that the edit is only measured. Runs of one sweep share their scoring, and so their losses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vitrim.deploy.runfolder import Record, Run, RunFolderError, read_diagnostic
from vitrim.files import escape
from vitrim.report.layout import SCREEN, Layout, title_width
from vitrim.report.summary import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitrim.report.figure import Look

MAX_EDITS = 10_000
MAX_CHARTS = 12
MAX_COLUMNS = 60
_LARGEST = 1e6  # nats
_NAME = re.compile(r"[\w.-]{1,256}", re.ASCII)
_IN_BLOCK = re.compile(r"(.*\.\d+)(?:\.(.+))?")
_FIELDS = ("kind", "name", "share", "predicted", "measured")

TITLE = "Predicted and measured losses"
NOTE = (
    "Losses of single edits of the dense network, in nats of the KL divergence from its decision: "
    "predicted -> measured (measured / predicted). Columns name what is edited and the share of it "
    "that is removed; attentions, MLPs and blocks that are dropped as a whole are only measured."
)


class MeasuredEdit(NamedTuple):
    """One edit of the dense network, and its loss in nats; predicted 0: only measured."""

    kind: str
    name: str
    share: float
    predicted: float
    measured: float


class RunLosses(NamedTuple):
    """What one run measured, with its record."""

    record: Record
    edits: tuple[MeasuredEdit, ...]


class _Column(NamedTuple):
    """A column of the table: a kind of edit, what it edits in a block, and which of its shares."""

    kind: str
    part: str
    which: float


def read_losses(run: Run) -> RunLosses | None:
    """Return the losses that a run measured, or None where there are none.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    diagnostic = read_diagnostic(run.folder, "losses")
    if diagnostic is None or not diagnostic.value:
        return None
    where, rows = diagnostic.where, diagnostic.value
    if not isinstance(rows, list) or len(rows) > MAX_EDITS:
        raise RunFolderError(f"{where}: expected a list of at most {MAX_EDITS:,} edits")
    for number, row in enumerate(rows):
        if not _fits(row):
            raise RunFolderError(
                f"{where}: {number}: expected names in `kind` and `name`, a number from 0 to 1 in "
                "`share`, and numbers of nats in `predicted` and `measured`"
            )
    edits = (MeasuredEdit(*(row[field] for field in _FIELDS)) for row in rows)
    return RunLosses(run.record, tuple(edits))


def _fits(row: object) -> bool:
    if not isinstance(row, dict) or not row.keys() >= {*_FIELDS}:
        return False
    names, numbers = ([row[field] for field in part] for part in (_FIELDS[:2], _FIELDS[2:]))
    return (
        all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
        and all(type(n) in (int, float) and abs(n) <= _LARGEST for n in numbers)
        and 0 <= row["share"] <= 1
    )


def measured_losses(runs: Sequence[Run]) -> list[RunLosses]:
    """Return what the runs measured: the first run of every series, and equal losses once.

    Raises:
        RunFolderError: losses that no run of vitrim wrote.
    """
    found: list[RunLosses] = []
    for run in runs:
        losses = read_losses(run)
        if losses is None:
            continue
        series = losses.record["series"]
        if not any(o.record["series"] == series or o.edits == losses.edits for o in found):
            found.append(losses)
    return found


def rank_correlation(edits: Sequence[MeasuredEdit]) -> float | None:
    """Return Spearman's correlation of predicted and measured losses.

    Edits that are only measured do not count; None for fewer than three others, or equal ones.
    """
    from scipy.stats import spearmanr

    predicted = [edit.predicted for edit in edits if edit.predicted]
    measured = [edit.measured for edit in edits if edit.predicted]
    if len(predicted) < 3 or len({*predicted}) < 2 or len({*measured}) < 2:
        return None
    return float(spearmanr(predicted, measured)[0])


def lines(runs: Sequence[Run]) -> list[str]:
    """Return a sentence on each network whose losses were measured."""
    return [
        f"rank correlation of predicted and measured loss: {correlation:.2f} over "
        f"{sum(edit.predicted != 0 for edit in losses.edits)} edits ({_title(losses)})"
        for losses in measured_losses(runs)
        if (correlation := rank_correlation(losses.edits)) is not None
    ]


def _title(losses: RunLosses) -> str:
    label, model, data = (losses.record[key] for key in NAMES)
    return f"{model} on {data}, {label}, seed {losses.record['seed']}"


def tables(runs: Sequence[Run]) -> list[tuple[str, list[list[str]]]]:
    """Return a caption and a table for each network: a line per block, headings first."""
    return [_table(losses) for losses in measured_losses(runs)]


def _table(losses: RunLosses) -> tuple[str, list[list[str]]]:
    cells: dict[str, dict[_Column, MeasuredEdit]] = {}
    for block, column, edit in _placed(losses.edits):
        cells.setdefault(block, {})[column] = edit
    used = [column for of_block in cells.values() for column in of_block]
    kinds = [*dict.fromkeys(column.kind for column in used)]
    parts = [*dict.fromkeys((column.kind, column.part) for column in used)]
    columns = sorted(
        {*used}, key=lambda c: (kinds.index(c.kind), parts.index((c.kind, c.part)), c.which)
    )
    shown = columns[:MAX_COLUMNS]
    omitted = len(columns) - len(shown)
    head = [_heading(c, [cells[block][c] for block in cells if c in cells[block]]) for c in shown]
    body = [
        [block or "-", *(_cell(of_block.get(column)) for column in shown)]
        for block, of_block in cells.items()
    ]
    caption = f"{_title(losses)}{f' ({omitted} columns not shown)' if omitted else ''}"
    return caption, [["block", *head], *body]


def _placed(edits: Sequence[MeasuredEdit]) -> Iterator[tuple[str, _Column, MeasuredEdit]]:
    """Iterate over the edits with the block and the column of each.

    The shares of ranks depend on the shape of a layer: they are numbered.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for edit in edits:
        match = _IN_BLOCK.fullmatch(edit.name)
        block, part = (match[1], match[2] or "") if match else ("", edit.name)
        counts[edit.kind, edit.name] += 1
        which = counts[edit.kind, edit.name] if edit.kind == "ranks" else edit.share
        yield block, _Column(edit.kind, part, which), edit


def _heading(column: _Column, edits: Sequence[MeasuredEdit]) -> str:
    if column.kind == "branches":
        return f"{column.part or 'block'} dropped"
    shares = sorted({f"{100 * edit.share:.0f}" for edit in edits}, key=float)
    percent = shares[0] if len(shares) == 1 else f"{shares[0]} to {shares[-1]}"
    of_kind = () if column.part.endswith(column.kind) else (column.kind,)
    return " ".join(filter(None, (column.part, *of_kind, percent, "%")))


def _cell(edit: MeasuredEdit | None) -> str:
    if edit is None:
        return "-"
    if not edit.predicted:
        return f"{edit.measured:.3g}"
    ratio = edit.measured / edit.predicted
    return f"{edit.predicted:.3g} -> {edit.measured:.3g} ({ratio:.2f}x)"


def has_figure(runs: Sequence[Run]) -> bool:
    """Whether there are losses to draw."""
    return bool(_charts(runs))


def _charts(runs: Sequence[Run]) -> list[RunLosses]:
    return [losses for losses in measured_losses(runs) if any(map(_is_drawn, losses.edits))]


def figure(runs: Sequence[Run], layout: Layout = SCREEN) -> dict[str, Figure]:
    """Return losses: predicted against measured loss; empty without edits of both."""
    from matplotlib import style
    from matplotlib.figure import Figure

    from vitrim.report.figure import frame, line_look

    charts = _charts(runs)
    shown = charts[:MAX_CHARTS]
    if not shown:
        return {}
    kinds = [*dict.fromkeys(edit.kind for losses in shown for edit in losses.edits)]
    looks = {kind: line_look(i) | {"linestyle": "", "alpha": 0.8} for i, kind in enumerate(kinds)}
    columns = min(layout.columns, len(shown))
    height = -(-len(shown) // columns)
    side = min(4.0, layout.width / layout.columns + 0.5)
    with style.context(["default", layout.style]):
        size = (min(0.4 + side * columns, layout.width + 1.4), 0.3 + 1.1 * side * height)
        picture = Figure(figsize=size, layout="constrained")
        grid = [*picture.subplots(height, columns, squeeze=False).flat]
        for axes, losses in zip(grid, shown, strict=False):
            frame(axes, "predicted loss (nats)", "measured loss (nats)")
            axes.set_title(escape.figure(_title(losses), width=title_width(layout, columns)))
            _draw(axes, losses.edits, looks)
        for axes in grid[len(shown) :]:
            axes.remove()
        if len(charts) > len(shown):
            picture.supxlabel(f"{len(charts) - len(shown)} more not drawn", fontsize=8)
        return {"losses": picture}


def _is_drawn(edit: MeasuredEdit) -> bool:
    """Whether both losses can be drawn on logarithmic axes."""
    return edit.predicted > 0 and edit.measured > 0


def _draw(axes: Axes, edits: Sequence[MeasuredEdit], looks: dict[str, Look]) -> None:
    values = [x for edit in edits for x in (edit.predicted, edit.measured) if x > 0]
    limits = (min(values) / 2, max(values) * 2)
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits, aspect="equal")
    correlation = rank_correlation(edits)
    total = "" if correlation is None else f" (rank correlation {correlation:.2f})"
    label = f"measured = predicted{total}"
    axes.plot(limits, limits, color="0.5", linestyle="--", linewidth=1.0, zorder=1.4, label=label)
    for kind in dict.fromkeys(edit.kind for edit in edits):
        of_kind = [edit for edit in edits if edit.kind == kind]
        drawn = [edit for edit in of_kind if _is_drawn(edit)]
        if drawn:
            of_points = rank_correlation(of_kind)
            label = kind if of_points is None else f"{kind} ({of_points:.2f})"
            x, y = ([edit[i] for edit in drawn] for i in (3, 4))
            axes.plot(x, y, **looks[kind] | {"markersize": 3.5}, label=escape.figure(label))
        only = [edit.measured for edit in of_kind if not edit.predicted and edit.measured > 0]
        if only:  # ticks at the left edge
            look = looks[kind] | {"marker": "_", "markersize": 9, "markeredgewidth": 1.0}
            label = escape.figure(f"{kind}, only measured")
            at_edge = axes.get_yaxis_transform()
            axes.plot([0.02] * len(only), only, transform=at_edge, **look, label=label)
    below: Look = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    axes.legend(**below, fontsize=7, handletextpad=0.4)
