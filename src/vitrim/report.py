"""Read the reports of finished runs and show them: a table, a CSV file, curves and a W&B run."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_TEXT, _COUNT, _NUMBER, _MAYBE = (str,), (int,), (int, float), (int, float, type(None))
_SIDE = {"params": _COUNT, "macs": _COUNT, "top1": _MAYBE, "top5": _MAYBE, "latency_ms": _MAYBE}
_SCHEMA: Mapping[str, tuple[type, ...]] = {
    **{f"choices.{name}": _TEXT for name in ("model", "data", "method")},
    **{"series": _TEXT, "strength": _MAYBE, "seed": _COUNT},
    **{"target.metric": _TEXT, "target.keep": _NUMBER, "kept.params": _NUMBER, "kept.macs": _NUMBER},
    **{f"{side}.{name}": kind for side in ("dense", "compact") for name, kind in _SIDE.items()},
    **{"cut.top1": _MAYBE},
}
_LATENCY = ("dense.latency_ms", "compact.latency_ms")
_SETTINGS = ("latency.batch", "latency.device", "latency.precision", "latency.threads")
_MEASURES = (*(key for key in _SCHEMA if key.split(".")[0] in ("dense", "compact", "cut")),)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
_MARKERS = "osD^vPX*"
_FAINT = {"linewidth": 0.8, "markersize": 2.5, "alpha": 0.5}
_DENSE = {"color": "0.5", "linestyle": "--", "linewidth": 1.0}
_STYLE = {"font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8}


class ReportError(ValueError):
    """A folder without reports, or a report.json that no run of vitrim wrote."""


class Run(NamedTuple):
    """A finished run: its folder, and its report with nested keys joined by dots."""

    folder: Path
    record: Mapping[str, Any]


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for a single value) and number of values."""

    mean: float
    std: float | None
    n: int


class Row(NamedTuple):
    """A series at one strength or target: the record of its first seed, the spreads over all."""

    record: Mapping[str, Any]
    spreads: Mapping[str, Spread | None]

    def mean(self, measure: str) -> float | None:
        """Return the mean over seeds, or None where nothing was measured."""
        found = self.spreads[measure]
        return None if found is None else found.mean


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `vitrim-report` command; exit with 1 and one line on stderr where it cannot."""
    parser = argparse.ArgumentParser("vitrim-report", description=__doc__)
    parser.add_argument("roots", nargs="*", type=Path, default=[Path("outputs")])
    parser.add_argument("--to", type=Path, metavar="DIR", help="write DIR/report/ (first root)")
    parser.add_argument("--wandb", choices=("offline", "online", "disabled"), default="offline")
    options = parser.parse_args(argv)
    try:
        finished, unfinished = find(options.roots)
        runs = sorted((read(folder) for folder in finished), key=_order)
        rows = summarise(runs)
        paths = write((options.to or options.roots[0]) / "report", runs, rows, unfinished)
    except (ReportError, OSError) as error:
        print(f"vitrim-report: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    show(rows)
    print(f"unfinished: {len(unfinished)}", *unfinished, sep="\n  ")
    print(*paths, *(f"{run.folder}  {_aim(run.record)} seed={run.record['seed']}" for run in runs),
          sep="\n", flush=True)
    if options.wandb != "disabled":
        log_wandb(rows, paths[0], mode=options.wandb)


def find(roots: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the folders of the finished and of the unfinished runs below `roots`.

    Raises:
        ReportError: a root is no folder, or no root holds a finished run.
    """
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise ReportError(f"{root}: no such folder; a run of `vitrim` makes it (out={root})")
        for name, children, files in os.walk(root):
            children[:] = sorted(set(children) - {"phases"})
            if "report.json" in files or "recipe.yaml" in files:
                group = finished if "report.json" in files else unfinished
                group.setdefault(Path(name).resolve(), Path(name))
    if not finished:
        raise ReportError(
            f"{', '.join(map(str, roots))}: no report.json below, and {len(unfinished)} unfinished "
            "runs; `vitrim` writes one at the end of a run, for example: vitrim strength=3"
        )
    return list(finished.values()), list(unfinished.values())


def read(folder: Path) -> Run:
    """Read and check the report of one run.

    Raises:
        ReportError: naming the file and what is wrong with it.
    """
    path = folder / "report.json"
    try:
        record = dict(_flat(json.loads(path.read_text("utf-8"), parse_constant=_refuse)))
    except ValueError as error:
        raise ReportError(f"{path}: no valid JSON ({error}); delete it and run again") from None
    if record.get("format") != 1:
        raise ReportError(f"{path}: format={record.get('format')}: expected 1, a run of `vitrim`")
    wrong = [key for key, kinds in _SCHEMA.items() if type(record.get(key, ...)) not in kinds]
    if wrong:
        raise ReportError(f"{path}: missing or of a wrong type: {', '.join(wrong)}")
    return Run(folder, record)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else key)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def spread(values: Iterable[float | None]) -> Spread | None:
    """Summarise the values that are there.

    >>> spread([90.0, 92.0, None])
    Spread(mean=91.0, std=1.4142135623730951, n=2)
    >>> spread([90.0])
    Spread(mean=90.0, std=None, n=1)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), std, len(known))


def per_seed(records: Iterable[Mapping[str, Any]], measure: str) -> list[float]:
    """Return one value per seed: a seed that ran twice counts once, with its mean."""
    seeds: dict[int, list[float]] = {}
    for record in records:
        if record[measure] is not None:
            seeds.setdefault(record["seed"], []).append(record[measure])
    return [statistics.fmean(values) for values in seeds.values()]


def summarise(runs: Iterable[Run]) -> list[Row]:
    """Return a row per series, strength and target: series by name, the mildest cut first."""
    cells = groupby(sorted(runs, key=_order), key=lambda run: _order(run)[:-2])
    return [_row([_derive(run.record) for run in cell]) for _, cell in cells]


def _order(run: Run) -> tuple[Any, ...]:
    record, strength = run.record, run.record["strength"]
    aim = (strength is None, strength or 0.0, record["target.metric"], -record["target.keep"])
    return (record["series"], *aim, record["seed"], str(run.folder))


def _derive(record: Mapping[str, Any]) -> dict[str, Any]:
    final, dense = record["compact.top1"], record["dense.top1"]
    delta = None if final is None or dense is None else final - dense
    kept = {f"kept_{name}": 100 * record[f"kept.{name}"] for name in ("macs", "params")}
    return {**record, **kept, "delta": delta}


def _row(records: Sequence[Mapping[str, Any]]) -> Row:
    measures = (*_MEASURES, "strength", "kept_macs", "kept_params", "delta")
    spreads = {measure: spread(per_seed(records, measure)) for measure in measures}
    if len({tuple(map(record.get, _SETTINGS)) for record in records}) > 1:
        spreads.update(dict.fromkeys(_LATENCY))  # a mean over machines means nothing
    return Row(records[0], spreads)


def _aim(record: Mapping[str, Any]) -> str:
    if record["strength"] is None:
        return f"{record['target.metric']}={record['target.keep']}"
    return f"strength={record['strength']:g}"


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the headings and then the cells of each row, as text; a dash is not measured."""
    size, unit = _macs_unit(rows)
    head = ["method", "model", "data", "strength", "kept MACs %", "params M", f"MACs {unit}"]
    head += ["top-1 dense", "top-1 cut", "top-1 final", "n", "delta", "top-5", "latency ms"]
    return [head, *(_cells(row, size) for row in rows)]


def _cells(row: Row, macs_size: float) -> list[str]:
    final, dense_ms, compact_ms = row.spreads["compact.top1"], *map(row.mean, _LATENCY)
    std = f" ± {final.std:.2f}" if final and final.std is not None else ""
    latency = "-"
    if dense_ms and compact_ms:
        latency = f"{_digits(dense_ms)} -> {_digits(compact_ms)} ({dense_ms / compact_ms:.2f}×)"
    return [
        *(row.record[f"choices.{name}"] for name in ("method", "model", "data")),
        _aim(row.record).removeprefix("strength="),
        _fixed(row.mean("kept_macs"), ".1f"),
        _digits((row.mean("compact.params") or 0) / 1e6, 4),
        _digits((row.mean("compact.macs") or 0) / macs_size, 4),
        _fixed(row.mean("dense.top1")),
        _fixed(row.mean("cut.top1")),
        _fixed(row.mean("compact.top1")) + std,
        str((final or row.spreads["kept_macs"] or (0,))[-1]),
        _fixed(row.mean("delta"), "+.2f"),
        _fixed(row.mean("compact.top5")),
        latency,
    ]


def _fixed(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _digits(value: float, digits: int = 3) -> str:
    places = digits - 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, places)}f}"


def _macs_unit(rows: Iterable[Row]) -> tuple[float, str]:
    return (1e9, "G") if max(row.record["dense.macs"] for row in rows) >= 1e9 else (1e6, "M")


def show(rows: Sequence[Row]) -> None:
    """Print the table; a model or data set that all rows share moves from a column to the title."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    head, *cells = table(rows)
    shared = [i for i in (1, 2) if len({row[i] for row in cells}) == 1]
    title = ", ".join(f"{head[i]} {cells[0][i]}" for i in shared)
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    kept = [i for i in range(len(head)) if i not in shared]
    for i in kept:
        grid.add_column(
            head[i].replace(" ", "\n"),
            justify="left" if i < 4 else "right",
            no_wrap=i > 3,
            overflow="fold",
            vertical="bottom",
        )
    for row in cells:
        grid.add_row(*(row[i] for i in kept))
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(grid)


def write(
    folder: Path, runs: Sequence[Run], rows: Sequence[Row], unfinished: Sequence[Path]
) -> list[Path]:
    """Write curve.png, report.md and report.csv into `folder`; return their absolute paths."""
    contents = {
        "curve.png": draw(rows),
        "report.md": markdown(runs, rows, unfinished).encode(),
        "report.csv": csv_text(runs).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        part = folder / f".{name}.{os.getpid()}"
        try:
            part.write_bytes(content)
            part.replace(folder / name)
        finally:
            part.unlink(missing_ok=True)
    return [folder.absolute() / name for name in contents]


def csv_text(runs: Sequence[Run]) -> str:
    """Return one line per run, every entry of its report in full precision; empty means null."""
    keys = sorted({key for run in runs for key in run.record})
    text = io.StringIO()
    lines = csv.DictWriter(text, ["folder", *keys], lineterminator="\n")
    lines.writeheader()
    lines.writerows({"folder": run.folder.as_posix(), **run.record} for run in runs)
    return text.getvalue()


def markdown(runs: Sequence[Run], rows: Sequence[Row], unfinished: Sequence[Path]) -> str:
    """Return the table, how to read it and where its numbers come from."""
    head, *cells = table(rows)
    align = ["---" if i < 4 else "---:" for i in range(len(head))]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, align, *cells)]
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "Top-1 and top-5 in percent; *cut* is before recovery, *final* after it: mean ± sample",
            "standard deviation over n seeds; *delta* is final minus dense. MACs of one image.",
            f"Latency: {_distinct(runs, _SETTINGS)} (batch, device, precision, threads).",
            f"Runs: {len(runs)} finished, {len(unfinished)} unfinished and left out.",
            f"Commit: {_distinct(runs, ('commit', 'dirty'))} (hash, uncommitted changes).",
            "",
            "![accuracy against strength and MACs](curve.png)",
            "",
        ]
    )


def _distinct(runs: Sequence[Run], keys: Sequence[str]) -> str:
    found = {" ".join(str(run.record.get(key, "-")) for key in keys) for run in runs}
    return "; ".join(sorted(found))


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
    size, unit = _macs_unit(rows)
    accuracy = ("compact.top1", "top-1 accuracy (%)", "cut.top1")
    by_macs = Panel("compact.macs", f"kept MACs ({unit})", *accuracy, x_size=size)
    return [Panel("strength", "strength", *accuracy), by_macs] if strength else [by_macs]


def labelled(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each series under its method, and under what else tells series apart."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(row.record["series"], []).append(row)
    names = ["choices.method", "choices.model", "choices.data"]
    parts = [name for name in names if name == names[0] or len({r.record[name] for r in rows}) > 1]
    labels = {name: ", ".join(g[0].record[part] for part in parts) for name, g in series.items()}
    counts = Counter(labels.values())
    return {
        label if counts[label] == 1 else f"{label}, {name.rsplit('-')[-1]}": series[name]
        for name, label in labels.items()
    }


def limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the accuracies to show: all final ones, and below them at most as much again.

    Before recovery a net often falls to chance; showing that would flatten the final curves.
    """
    finals = [final for row in rows if (final := row.spreads["compact.top1"])]
    dense = [mean for row in rows if (mean := row.mean("dense.top1")) is not None]
    cuts = [mean for row in rows if (mean := row.mean("cut.top1")) is not None]
    low = min(final.mean - (final.std or 0) for final in finals)
    high = max([final.mean + (final.std or 0) for final in finals] + dense)
    span = max(high - low, 1.0)
    low = max(min([low, *cuts]), low - span)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def draw(rows: Sequence[Row]) -> bytes:
    """Return the figure as a PNG: a line per series, error bars of one standard deviation."""
    from matplotlib import style
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(7.0, 3.2), layout="constrained")
        chosen = panels(rows)
        accuracy = chosen[0].faint is not None
        grid = figure.subplots(1, len(chosen), squeeze=False, sharey=accuracy)[0]
        for axes, panel in zip(grid, chosen, strict=True):
            _draw_panel(axes, panel, rows)
        for axes in grid[1:] if accuracy else ():
            axes.set_ylabel("")
        handles = _legend(rows, accuracy=accuracy)
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4))
        figure.savefig(content, format="png", dpi=300, metadata={"Software": None})
    return content.getvalue()


def _draw_panel(axes: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    for index, group in enumerate(labelled(rows).values()):
        if panel.faint and (faint := _points(group, panel, panel.faint)):
            axes.plot(*faint[:2], **{**_look(index), **_FAINT})
        if line := _points(group, panel, panel.y):
            axes.errorbar(*line, **_look(index), capsize=2, elinewidth=0.8)
    if panel.faint:
        for dense in {round(mean, 2) for row in rows if (mean := row.mean("dense.top1"))}:
            axes.axhline(dense, **_DENSE)
        axes.set_ylim(*limits(rows))
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(color="0.92", linewidth=0.6)


def _points(rows: Sequence[Row], panel: Panel, y: str) -> tuple[list[float], ...]:
    found = [
        (x / panel.x_size, value.mean, math.nan if value.std is None else value.std)
        for row in rows
        if (x := row.mean(panel.x)) is not None and (value := row.spreads[y])
    ]
    return tuple(map(list, zip(*sorted(found), strict=True)))


def _look(index: int) -> dict[str, Any]:
    style = ("-", "--", "-.")[index // len(_COLOURS) % 3]
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": style, "markersize": 4, "linewidth": 1.4}


def _legend(rows: Sequence[Row], *, accuracy: bool) -> list[Line2D]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **_look(i)) for i, label in enumerate(labelled(rows))]
    if accuracy and any(row.mean("cut.top1") is not None for row in rows):
        faint = {"color": "0.4", "marker": "o", **_FAINT}
        handles.append(Line2D([], [], label="after the cut, before recovery", **faint))
    if accuracy and any(row.mean("dense.top1") is not None for row in rows):
        handles.append(Line2D([], [], label="dense", **_DENSE))
    return handles


def log_wandb(rows: Sequence[Row], png: Path, *, mode: Literal["offline", "online"]) -> None:
    """Log the rows, their curves and the figure as one W&B run; a failure is only a warning."""
    try:
        import wandb

        settings = wandb.Settings(silent=True, quiet=True, console="off")
        with wandb.init(
            project="vitrim",
            job_type="report",
            dir=png.parent.parent,
            mode=mode,
            reinit="create_new",
            settings=settings,
        ) as run:
            head, *cells = numbers(rows)
            run.log({"rows": wandb.Table(head, cells), "curve": wandb.Image(str(png))})
            panel = Panel("strength", "strength", "compact.top1", "top-1 accuracy (%)")
            found = {label: _points(group, panel, panel.y) for label, group in labelled(rows).items()}
            lines = {label: points for label, points in found.items() if points}
            if lines:
                xs, ys = [line[0] for line in lines.values()], [line[1] for line in lines.values()]
                title = "top-1 (%) against strength"
                plot = wandb.plot.line_series(xs, ys, list(lines), title=title, xname="strength")
                run.log({"strength_top1": plot})
    except Exception as error:  # the report is on disk by now, and tracking must not spoil it
        logging.getLogger(__name__).warning("W&B: %s", error)


def numbers(rows: Sequence[Row]) -> list[list[Any]]:
    """Return the headings and then the values of each row, in full precision, for W&B."""
    keys = ("choices.method", "choices.model", "choices.data", "series")
    head = [*keys, "target", *rows[0].spreads, "compact.top1.std", "seeds"]
    ...
