"""Draw the losses of trainings from the metrics.jsonl of runs: training, a panel for each phase."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from vitrim.deploy.runfolder import Run
from vitrim.errors import VitrimError
from vitrim.files import escape, read_bytes
from vitrim.report.figure import Look, frame, labelled, line_look
from vitrim.report.layout import SCREEN, Layout, title_width, with_legend
from vitrim.report.summary import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 12
_MAX_BYTES, _MAX_POINTS = 2**26, 2_000
_LARGEST, _LARGEST_STEP = 1e30, 2**53
_LOG_RANGE = 50  # of losses on a linear axis


class Losses(NamedTuple):
    """The losses that one run logged in one phase, by its steps from the phase's first."""

    series: str
    steps: list[int]
    losses: list[float]


def figure(runs: Sequence[Run], layout: Layout = SCREEN) -> dict[str, Figure]:
    """Return training, a panel for each phase; empty where no run trained anything."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    phases = losses_by_phase(runs)
    shown = [*phases.items()][:MAX_PANELS]
    if not shown:
        return {}
    rows = [Row(run.record, {}) for run in runs]
    names = {part[0].record["series"]: label for label, part in labelled(rows).items()}
    looks = {series: _look(index) for index, series in enumerate(names)}
    drawn = {line.series for _, lines in shown for line in lines}
    columns = min(layout.columns, len(shown))
    height = -(-len(shown) // columns)
    with style.context(["default", layout.style]):
        picture = Figure(figsize=(layout.width, 0.6 + 2.1 * height), layout="constrained")
        grid = [*picture.subplots(height, columns, squeeze=False).flat]
        for axes, (phase, lines) in zip(grid, shown, strict=False):
            axes.set_title(escape.figure(phase, width=title_width(layout, columns)))
            _draw(axes, lines, looks)
        for axes in grid[len(shown) :]:
            axes.remove()
        handles = [
            Line2D([], [], label=escape.figure(label), **looks[series])
            for series, label in names.items()
            if series in drawn
        ]
        if len(phases) > len(shown):
            rest = f"{len(phases) - len(shown)} phases not drawn"
            handles.append(Line2D([], [], label=rest, linestyle=""))
        return {"training": with_legend(picture, handles, layout)}


def losses_by_phase(runs: Sequence[Run]) -> dict[str, list[Losses]]:
    """Return what each run logged under `loss`, by phase in the order of the runs.

    Phases that runs share are in the file of the run that trained them. What is no line of JSON,
    as the last line of a run that was killed, is skipped.
    """
    found: dict[str, list[Losses]] = {}
    for run in runs:
        points: dict[str, dict[int, float]] = {}
        for phase, step, loss in _logged(run):
            points.setdefault(phase, {})[step] = loss
        for phase, losses in points.items():
            if len(losses) > 1:
                steps = sorted(losses)[:: -(-len(losses) // _MAX_POINTS)]
                line = Losses(
                    run.record["series"],
                    [step - steps[0] for step in steps],
                    [losses[step] for step in steps],
                )
                found.setdefault(phase, []).append(line)
    return found


def _logged(run: Run) -> Iterator[tuple[str, int, float]]:
    """Iterate over phase, step and loss of the lines that have a loss."""
    try:
        content = read_bytes(run.folder / "metrics.jsonl", _MAX_BYTES)
    except (OSError, VitrimError):
        return
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict):
            continue
        phase, step, loss = entry.get("phase"), entry.get("step"), entry.get("loss")
        if isinstance(phase, str) and _is_step(step) and _is_loss(loss):
            yield phase, step, loss


def _is_step(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LARGEST_STEP


def _is_loss(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < _LARGEST  # type: ignore[arg-type]  # no nan


def _look(index: int) -> Look:
    return line_look(index) | {"marker": "", "linewidth": 1.0}


def _draw(axes: Axes, lines: Sequence[Losses], looks: Mapping[str, Look]) -> None:
    frame(axes, "step of the phase", "loss")
    for line in lines:
        axes.plot(line.steps, line.losses, **looks[line.series], alpha=0.8)
    values = [loss for line in lines for loss in line.losses]
    if 0 < min(values) * _LOG_RANGE < max(values):
        axes.set_yscale("log")
