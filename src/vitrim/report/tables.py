"""Show the reports of finished runs: a table, a CSV file, curves and a W&B run."""

from __future__ import annotations

import csv
import io
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vitrim import files
from vitrim.paper.results import results
from vitrim.report import compare, trial_figure
from vitrim.report import papers as papers
from vitrim.report.figure import Panel, draw, labelled, line_of
from vitrim.report.rank_figures import figures
from vitrim.report.summary import (
    LATENCY,
    NAMES,
    SETTINGS,
    Row,
    Run,
    Spread,
    find,
    fixed,
    macs_unit,
    order,
    read,
    sections,
    summarise,
)

OUTPUTS = [Path("outputs")]
INT8_NOTE = (
    "Accuracies of the compact nets with every Linear in int8 and no further training; *delta* is "
    "int8 minus float. MB are 1e6 bytes of parameters and buffers."
)


def _aim(record: Mapping[str, Any]) -> str:
    if record["strength"] is None:
        return f"{record['target.metric']}={record['target.keep']}"
    return f"strength={record['strength']:g}"


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the headings and then the cells of each row; a dash stands for not measured."""
    size, unit = macs_unit(rows)
    head = ["method", "model", "data", "strength", "kept MACs %", "params M", f"MACs {unit}"]
    head += ["top-1 dense", "top-1 cut", "top-1 final", "n", "delta", "top-5", "latency ms"]
    return [head, *(_cells(row, size) for row in rows)]


def _cells(row: Row, macs_size: float) -> list[str]:
    final = row.spreads["compact.top1"]
    counted = final or row.spreads["kept_macs"]
    return [
        *(row.record[key] for key in NAMES),
        _aim(row.record).removeprefix("strength="),
        fixed(row.mean("kept_macs"), ".1f"),
        _digits((row.mean("compact.params") or 0) / 1e6, 4),
        _digits((row.mean("compact.macs") or 0) / macs_size, 4),
        fixed(row.mean("dense.top1")),
        fixed(row.mean("cut.top1")),
        fixed(row.mean("compact.top1")) + _plus_minus(final),
        str(counted.n if counted else 0),
        fixed(row.mean("delta"), "+.2f"),
        fixed(row.mean("compact.top5")),
        _latency(*map(row.mean, LATENCY)),
    ]


def _plus_minus(found: Spread | None) -> str:
    return "" if found is None or found.std is None else f" ± {found.std:.2f}"


def _digits(value: float, digits: int) -> str:
    places = digits - 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(0, places), 4)}f}"


def _latency(dense_ms: float | None, compact_ms: float | None) -> str:
    if not dense_ms or not compact_ms:
        return "-"
    return f"{_digits(dense_ms, 3)} -> {_digits(compact_ms, 3)} ({dense_ms / compact_ms:.2f}x)"


def quantized(rows: Sequence[Row]) -> list[list[str]]:
    """Return the headings and a line per row and int8 scheme; nothing where none was evaluated."""
    head = ["method", "model", "data", "strength", "scheme", "MB float", "MB int8"]
    head += ["top-1 float", "top-1 int8", "n", "delta", "top-5"]
    pairs = [(row, key[:-3]) for row in rows for key in row.spreads if key.endswith(".mb")]
    return [head, *(_int8_cells(row, measured) for row, measured in pairs)] if pairs else []


def _int8_cells(row: Row, measured: str) -> list[str]:
    final = row.spreads.get(f"{measured}.top1")
    counted = final or row.spreads[f"{measured}.mb"]
    return [
        *(row.record[key] for key in NAMES),
        _aim(row.record).removeprefix("strength="),
        measured.removeprefix("quantized."),
        _digits(row.mean("float_mb") or 0, 4),
        _digits(row.mean(f"{measured}.mb") or 0, 4),
        fixed(row.mean("compact.top1")),
        fixed(row.mean(f"{measured}.top1")) + _plus_minus(final),
        str(counted.n if counted else 0),
        fixed(row.mean(f"{measured}.delta"), "+.2f"),
        fixed(row.mean(f"{measured}.top5")),
    ]


def show(rows: Sequence[Row]) -> None:
    """Print a table per model and data set, narrow enough for 100 columns."""
    from rich.console import Console

    width = max(100, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 120
    console = Console(width=width, markup=False, highlight=False)
    for (model, data), part in sections(rows).items():
        for note, lines in (("", table(part)), (" in int8", quantized(part))):
            if lines:
                short = [[line[0], *line[3:]] for line in lines]
                grid = _grid(short, left=("method", "strength", "scheme"))
                console.print(f"{model} on {data}{note}", grid, "", sep="\n")
    lines = compare.comparison(rows)
    if lines:
        console.width = max(console.width, 165)  # figures are not cut short
        grid = _grid([compare.HEAD, *lines], left=("row",))
        console.print("beside the published numbers", grid, "", sep="\n")


def beside_papers(roots: Sequence[Path], to: Path | None) -> None:
    """Print every published row with ours beside it; write it as report/paper.md, too.

    Without runs, and without a folder for them, nothing is written and every row says so.
    """
    from rich.console import Console

    there = [root for root in roots if root.is_dir() or roots != OUTPUTS]
    finished, _ = find(there, empty=True)
    rows = summarise(sorted((read(folder) for folder in finished), key=order))
    found = papers.sections(rows, results())
    console = Console(width=165, markup=False, highlight=False)
    for part in found:
        lines = [part.head, *part.lines]
        grid = _grid(lines, left=("table", "network", "what", "known from"))
        console.print(part.title, grid, part.note, "", sep="\n")
    console.print(papers.NOTE)
    place = to or next(iter(there), None)
    if place is not None:
        content = "\n".join(_paper_markdown(found)).encode()
        print(*_write(place / "report", {"paper.md": content}), sep="\n")


def _paper_markdown(found: Sequence[papers.Section]) -> Iterator[str]:
    for part in found:
        grid = _markdown_grid([part.head, *part.lines], left=3 if part.head == papers.HEAD else 1)
        yield from (f"## {part.title}", "", *grid, "", part.note, "")
    yield from (papers.NOTE, "", "## Commands of the published rows", "")
    yield from (f"- {name}: `{command}`" for name, command in papers.commands())
    yield ""


def _grid(lines: Sequence[Sequence[str]], *, left: Sequence[str]) -> Any:
    """Return a table whose columns named `left` are aligned to the left, and may wrap."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    head, *cells = lines
    for name in head:
        justify: Literal["left", "right"] = "left" if name in left else "right"
        heading = name.replace(" ", "\n")
        grid.add_column(heading, justify=justify, no_wrap=name not in left, vertical="bottom")
    for line in cells:
        grid.add_row(*line)
    return grid


def write(
    folder: Path,
    runs: Sequence[Run],
    rows: Sequence[Row],
    unfinished: Sequence[Path],
    *,
    page: bool = False,
    absent: Sequence[str] = (),
) -> list[Path]:
    """Write figures, report.md and report.csv into `folder`; return their absolute paths.

    With `page`, report.html as well, which holds all that a reader needs.
    """
    pictures = {"curve.png": draw(rows), **figures(runs, rows), **trial_figure.figure(runs)}
    contents = {
        **pictures,
        "report.md": markdown(runs, rows, absent).encode(),
        "report.csv": csv_text(runs).encode(),
    }
    if page:
        contents["report.html"] = _page(folder, runs, rows, unfinished, pictures).encode()
    return _write(folder, contents)


def _write(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        files.write(folder / name, partial(Path.write_bytes, data=content))
    return [folder.absolute() / name for name in contents]


def _page(
    folder: Path,
    runs: Sequence[Run],
    rows: Sequence[Row],
    unfinished: Sequence[Path],
    pictures: Mapping[str, bytes],
) -> str:
    from vitrim.report.page import html

    compared = compare.comparison(rows)
    return html(
        folder,
        runs,
        unfinished,
        pictures,
        tables=[
            (f"{model} on {data}", [[line[0], *line[3:]] for line in table(part)])
            for (model, data), part in sections(rows).items()
        ],
        quantized=quantized(rows),
        int8_note=INT8_NOTE,
        compared=[compare.HEAD, *compared] if compared else [],
        paper_note=compare.NOTE,
        commits=_distinct(runs, ("commit", "dirty")),
        settings=_distinct(runs, SETTINGS),
    )


def csv_text(runs: Sequence[Run]) -> str:
    """Return one line per run, every entry of its report in full precision; empty means null."""
    keys = sorted({key for run in runs for key in run.record})
    text = io.StringIO()
    lines = csv.DictWriter(text, ["folder", *keys], lineterminator="\n")
    lines.writeheader()
    lines.writerows({"folder": run.folder.as_posix(), **run.record} for run in runs)
    return text.getvalue()


def markdown(runs: Sequence[Run], rows: Sequence[Row], absent: Sequence[str]) -> str:
    """Return the table, how to read it and where its numbers come from."""
    notes = [
        "Accuracies in percent: *cut* before recovery, *final* after it, as mean ± sample standard",
        "deviation over n seeds; *delta* is final minus dense. MACs of one image.",
        "Below a break mark the figure's axis is squeezed: nets before recovery fall far.",
        f"Latency (batch, device, precision, threads): {_distinct(runs, SETTINGS)}.",
        f"Commit (uncommitted changes): {_distinct(runs, ('commit', 'dirty'))}.",
        f"Runs: {len(runs)} finished; {len(absent)} unfinished, left out.",
        *(f"\n* {line}" for line in absent),
    ]
    int8 = _markdown_grid(quantized(rows), left=5)
    parts = ["## In int8", "", *int8, "", INT8_NOTE, ""] if int8 else []
    parts += compare.markdown(compare.comparison(rows))
    parts += [line for said in trial_figure.lines(runs) for line in (f"{said}.", "")]
    grid = _markdown_grid(table(rows), left=4)
    return "\n".join([*grid, "", *notes, "", *parts, "![curves](curve.png)", ""])


def _markdown_grid(lines: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return a table as lines of Markdown, its first `left` columns aligned to the left."""
    align = [":---" if i < left else "---:" for i in range(len(lines[0]))] if lines else []
    cells = [
        [cell.replace("|", "\\|") for cell in line] for line in (*lines[:1], align, *lines[1:])
    ]
    return [f"| {' | '.join(line)} |" for line in cells if line]


def _distinct(runs: Sequence[Run], keys: Sequence[str]) -> str:
    found = {" ".join(str(run.record[key]) for key in keys if key in run.record) for run in runs}
    return "; ".join(sorted(found))


def log_wandb(rows: Sequence[Row], png: Path, *, mode: Literal["offline", "online"]) -> None:
    """Log the rows, their curves and the figure as one W&B run; a failure is only a warning."""
    try:
        import wandb

        quiet = wandb.Settings(silent=True, quiet=True, console="off")
        place: dict[str, Any] = {"project": "vitrim", "job_type": "report", "dir": png.parents[1]}
        with wandb.init(**place, mode=mode, reinit="create_new", settings=quiet) as run:
            head, *cells = numbers(rows)
            run.log({"rows": wandb.Table(head, cells), "curve": wandb.Image(str(png))})
            lines = compare.comparison(rows)
            if lines:
                run.log({"published": wandb.Table([*compare.HEAD], lines)})
            panel = Panel("strength", "strength", "compact.top1", "top-1 accuracy (%)")
            found = {label: line_of(part, panel, panel.y) for label, part in labelled(rows).items()}
            curves = {label: points for label, points in found.items() if points}
            if curves:
                xs, ys = [line.x for line in curves.values()], [line.y for line in curves.values()]
                names, title = list(curves), "top-1 accuracy (%) against strength"
                plot = wandb.plot.line_series(xs, ys, names, title=title, xname="strength")
                run.log({"strength_top1": plot})
    except Exception as error:  # the report is on disk by now, and tracking must not spoil it
        logging.getLogger(__name__).warning("W&B: %s", error)


def numbers(rows: Sequence[Row]) -> list[list[Any]]:
    """Return the headings and then the values of each row, in full precision."""
    texts = ("series", *NAMES, "target.metric", "target.keep")
    measures = tuple(dict.fromkeys(measure for row in rows for measure in row.spreads))
    finals = [row.spreads["compact.top1"] or Spread(math.nan, None, 0) for row in rows]
    values = [
        [*(row.record[key] for key in texts), *map(row.mean, measures), final.std, final.n]
        for row, final in zip(rows, finals, strict=True)
    ]
    return [[*texts, *measures, "compact.top1.std", "n"], *values]
