"""Write the report of finished runs: tables, a CSV file, figures, a page and a W&B run."""

from __future__ import annotations

import csv
import io
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from vitrim import files
from vitrim.deploy.runfolder import CONTROL, QUANTIZED, SETTINGS, Run
from vitrim.deploy.table import latex_table, markdown_table, terminal_table
from vitrim.files import escape
from vitrim.paper.results import ABSENT, results
from vitrim.report import compare, loss_figure, papers, pareto, trial_figure
from vitrim.report.figures import captions, figures
from vitrim.report.layout import PRINTED, SCREEN, rendered
from vitrim.report.summary import (
    LATENCY,
    NAMES,
    Row,
    Spread,
    budget_of,
    fixed,
    macs_unit,
    sections,
    summarise,
)

OUTPUTS = [Path("outputs")]
_OTHER = "backslashreplace"  # for names of folders that are no text
CONTROL_HEAD = ("top-1 control", "to control")
CONTROL_NOTE = (
    "*control*: the dense network, trained further for as long as the compact one and by the same "
    "recipes; *to control* is final minus control: what the removal costs at equal training."
)
INT8_NOTE = (
    "Accuracies of the compact networks with every Linear in int8, without further training; "
    "*delta* is int8 minus float. MB are 1e6 bytes of parameters and buffers."
)


def results_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the headings and then the cells of each row; a dash means not measured."""
    size, unit = macs_unit(rows)
    head = ["method", "model", "data", "strength", "kept MACs %", "params M", f"MACs {unit}"]
    head += ["top-1 dense", "top-1 cut", "top-1 final", "n", "delta", "top-5", "latency ms"]
    cells = [[*_cells(row, size), marks.get("", "-")] for row, marks in _marked(rows)]
    lines = [[*head, "front"], *cells]
    return _with_control(lines, rows) if any(map(has_control, rows)) else lines


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what the columns of the table mean that need more than their names."""
    return [pareto.NOTE, *([CONTROL_NOTE] if any(map(has_control, rows)) else [])]


def has_control(row: Row) -> bool:
    """Whether the dense network of a row was also trained as long as the compact one."""
    return row.mean(CONTROL) is not None


def _with_control(lines: Sequence[Sequence[str]], rows: Sequence[Row]) -> list[list[str]]:
    """Return the table with the accuracy of the control, and what the compact network has more."""
    more = [(fixed(row.mean(CONTROL)), fixed(row.mean("to_control"), "+.2f")) for row in rows]
    dense, delta = lines[0].index("top-1 dense") + 1, lines[0].index("delta") + 1
    return [
        [*line[:dense], control, *line[dense:delta], to_control, *line[delta:]]
        for line, (control, to_control) in zip(lines, [CONTROL_HEAD, *more], strict=True)
    ]


def _marked(rows: Sequence[Row]) -> list[tuple[Row, dict[str, str]]]:
    """Return the rows with the letters of the Pareto fronts that they are on, by int8 scheme."""
    return [*zip(rows, pareto.marks(rows), strict=True)]


def _cells(row: Row, macs_size: float) -> list[str]:
    final = row.spreads["compact.top1"]
    counted = final or row.spreads["kept_macs"]
    return [
        *(row.record[key] for key in NAMES),
        _budget(row),
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


def _budget(row: Row) -> str:
    """Return the strength as a number, or the target with its metric."""
    return budget_of(row.record).removeprefix("strength=")


def _plus_minus(spread: Spread | None) -> str:
    return "" if spread is None or spread.std is None else f" ± {spread.std:.2f}"


def _digits(value: float, digits: int) -> str:
    decimals = digits - 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(0, decimals), 4)}f}"


def _latency(dense_ms: float | None, compact_ms: float | None) -> str:
    if not dense_ms or not compact_ms:
        return "-"
    return f"{_digits(dense_ms, 3)} -> {_digits(compact_ms, 3)} ({dense_ms / compact_ms:.2f}x)"


def int8_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the headings and a line per row and int8 scheme; nothing where none was evaluated."""
    head = ["method", "model", "data", "strength", "scheme", "MB float", "MB int8"]
    head += ["top-1 float", "top-1 int8", "n", "delta", "top-5", "latency ms", "front"]
    lines = [
        [*_int8_cells(row, f"{QUANTIZED[1]}{scheme}"), marks.get(scheme, "-")]
        for row, marks in _marked(rows)
        for scheme in pareto.schemes_of(row)
    ]
    return [head, *lines] if lines else []


def _int8_cells(row: Row, prefix: str) -> list[str]:
    final = row.spreads.get(f"{prefix}.top1")
    counted = final or row.spreads[f"{prefix}.mb"]
    return [
        *(row.record[key] for key in NAMES),
        _budget(row),
        prefix.removeprefix("quantized."),
        _digits(row.mean("float_mb") or 0, 4),
        _digits(row.mean(f"{prefix}.mb") or 0, 4),
        fixed(row.mean("compact.top1")),
        fixed(row.mean(f"{prefix}.top1")) + _plus_minus(final),
        str(counted.n if counted else 0),
        fixed(row.mean(f"{prefix}.delta"), "+.2f"),
        fixed(row.mean(f"{prefix}.top5")),
        _latency(
            row.mean(f"{prefix}.float_ms") or row.mean("compact.latency_ms"),
            row.mean(f"{prefix}.latency_ms"),
        ),
    ]


def _without_names(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return a table without model and data set, which its caption names."""
    return [[line[0], *line[3:]] for line in lines]


def _narrow(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return a table for the terminal, without the names and without the column of fronts.

    With a control it is without top-5 and the number of MACs as well.
    """
    head = lines[0] if CONTROL_HEAD[0] in lines[0] else ()
    left_out = [i for i, name in enumerate(head) if name == "top-5" or name.startswith("MACs ")]
    kept = [[cell for i, cell in enumerate(line) if i not in left_out] for line in lines]
    return [line[:-1] for line in _without_names(kept)]


def show(rows: Sequence[Row]) -> None:
    """Print a table per model and data set, narrow enough for 100 columns."""
    from rich.console import Console

    width = max(100, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 120
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    for (model, data), part in sections(rows).items():
        title = escape.terminal(f"{model} on {data}")
        table = terminal_table(_narrow(results_table(part)), left=2)
        console.print(title, table, "", sep="\n")
        if int8 := int8_table(part):
            table = terminal_table(_narrow(int8), left=3)
            console.print(f"{title} in int8", table, "", sep="\n")
    lines, others = compare.comparison(rows), compare.repeated(rows).others
    if lines:
        console.width = max(console.width, 230)  # numbers are not cut short
        table = terminal_table([compare.HEAD, *lines], left=2)
        console.print(compare.TITLE, table, "", sep="\n")
    if others:
        print(*map(escape.terminal, others), "", sep="\n")


def show_papers(runs: Sequence[Run], folder: Path | None) -> None:
    """Print every published row with our numbers, and write paper.md into `folder`, if any."""
    from rich.console import Console

    if folder is not None:
        files.own_folder(folder)
    rows, measured = summarise(runs), results()
    parts, notes = papers.sections(rows, measured), [papers.NOTE, *([] if measured else [ABSENT])]
    console = Console(width=230, markup=False, highlight=False, emoji=False)
    for part in parts:
        table = terminal_table(part.lines, left=part.left)
        console.print(part.title, table, sep="\n")
        console.print(*map(escape.terminal, part.notes), "", sep="\n")
    console.print(*notes, sep="\n")
    if folder is not None:
        content = "\n".join(_papers_markdown(parts, notes)).encode(errors=_OTHER)
        print(*map(escape.terminal, _write(folder, {"paper.md": content})), sep="\n")


def _papers_markdown(parts: Sequence[papers.Section], notes: Sequence[str]) -> Iterator[str]:
    for part in parts:
        yield from (f"## {escape.markdown(part.title)}", "")
        yield from (*markdown_table(part.lines, left=part.left), "")
        yield from (f"* {escape.markdown(note)}" for note in part.notes)
        yield ""
    yield from (*notes, "", "## Commands of the published rows", "")
    for name, command in papers.commands():
        yield f"- {escape.markdown(name)}: {escape.code(command)}"
    yield ""


def write(
    folder: Path,
    runs: Sequence[Run],
    rows: Sequence[Row],
    unfinished: Sequence[Path],
    *,
    page: bool = False,
    printed: str | None = None,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write figures, report.md and report.csv into `folder`; return their absolute paths.

    `notes` are lines on the unfinished runs. `page` adds report.html, which needs no other file.
    `printed` is the width of a paper (`vitrim.report.layout.PRINTED`): it adds every figure as PDF
    and SVG in this width, and report.tex.
    """
    files.own_folder(folder)
    blocks = page or printed is not None
    pictures = rendered(figures(runs, rows, SCREEN, blocks=blocks), SCREEN)
    contents = dict(pictures)
    if printed is not None:
        layout = PRINTED[printed]
        contents |= rendered(figures(runs, rows, layout, blocks=blocks), layout)
        contents["report.tex"] = "\n".join(latex(rows)).encode()
    contents |= {
        "report.md": markdown(runs, rows, notes).encode(errors=_OTHER),
        "report.csv": csv_text(runs).encode(errors=_OTHER),
    }
    if page:
        text = _page(folder, runs, rows, unfinished, pictures)
        contents["report.html"] = text.encode(errors=_OTHER)
    return _write(folder, contents)


def _write(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    files.own_folder(folder)
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
    from vitrim.report.page import Tables, html

    compared, others = compare.comparison(rows), compare.repeated(rows).others
    tables = Tables(
        results=[
            (f"{model} on {data}", model, _without_names(results_table(part)))
            for (model, data), part in sections(rows).items()
        ],
        int8=int8_table(rows),
        int8_note=INT8_NOTE,
        compared=[compare.HEAD, *compared] if compared else [],
        others=others,
        losses=loss_figure.tables(runs),
        losses_note=loss_figure.NOTE,
        front_note=" ".join(_notes(rows)),
        commits=_distinct(runs, ("commit", "dirty")),
        settings=_distinct(runs, SETTINGS),
    )
    alts = {f"{name}.png": caption for name, caption in captions(rows).items()}
    return html(folder, runs, unfinished, pictures, tables, alts)


def csv_text(runs: Sequence[Run]) -> str:
    """Return one line per run, every entry of its report in full precision; empty means null."""
    keys = sorted({key for run in runs for key in run.record})
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(map(escape.csv, ["folder", *keys]))
    for run in runs:
        values = [run.folder.as_posix(), *map(run.record.get, keys)]
        lines.writerow(map(escape.csv, values))
    return text.getvalue()


def markdown(runs: Sequence[Run], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Return the table, how to read it and where its numbers come from.

    `notes` are lines on the unfinished runs.
    """
    explanation = [
        "Accuracies in percent: *cut* before recovery, *final* after it, as mean ± sample standard",
        "deviation over n seeds; *delta* is final minus dense. MACs of one image.",
        *_notes(rows),
        f"Latency (batch, device, precision, threads): {_markdown_distinct(runs, SETTINGS)}.",
        f"Commit (uncommitted changes): {_markdown_distinct(runs, ('commit', 'dirty'))}.",
        f"Runs: {len(runs)} finished; {len(notes)} unfinished, omitted.",
        *(f"\n* {escape.markdown(line)}" for line in notes),
    ]
    int8 = markdown_table(int8_table(rows), left=5)
    parts = ["## In int8", "", *int8, "", INT8_NOTE, ""] if int8 else []
    parts += compare.markdown(compare.comparison(rows), compare.repeated(rows).others)
    parts += [*_fronts_markdown(rows), *_losses_markdown(runs)]
    for sentence in trial_figure.lines(runs):
        parts += [f"{escape.markdown(sentence)}.", ""]
    table = markdown_table(results_table(rows), left=4)
    return "\n".join([*table, "", *explanation, "", *parts, "![curves](curve.png)", ""])


def latex(rows: Sequence[Row]) -> Iterator[str]:
    """Iterate over the lines of the tables in LaTeX, one for each model and data set."""
    yield r"% \usepackage{booktabs}"
    for (model, data), part in sections(rows).items():
        yield f"% {escape.latex(f'{model} on {data}')}"
        yield from (*latex_table(_without_names(results_table(part)), left=1), "")
        if int8 := int8_table(part):
            yield f"% {escape.latex(f'{model} on {data}, in int8')}"
            yield from (*latex_table(_without_names(int8), left=1), "")
    if lines := compare.comparison(rows):
        yield f"% {compare.TITLE}"
        yield from (*latex_table([compare.HEAD, *lines], left=2), "")


def _fronts_markdown(rows: Sequence[Row]) -> Iterator[str]:
    """Iterate over the lines of a section with the Pareto fronts; none without a figure."""
    fronts = pareto.captions(rows)
    yield from ["## Pareto fronts", ""] if fronts else []
    for name, caption in fronts.items():
        yield from (f"![Pareto fronts]({name}.png)", "", f"{escape.markdown(caption)}.", "")


def _losses_markdown(runs: Sequence[Run]) -> Iterator[str]:
    """Iterate over the lines of a section on predicted losses; none where none were measured."""
    tables = loss_figure.tables(runs)
    yield from [f"## {loss_figure.TITLE}", "", loss_figure.NOTE, ""] if tables else []
    for caption, table in tables:
        yield from (f"{escape.markdown(caption)}:", "", *markdown_table(table, left=1), "")
    for sentence in loss_figure.lines(runs):
        yield from (f"{escape.markdown(sentence)}.", "")
    if loss_figure.has_figure(runs):
        yield from ("![predicted and measured losses](losses.png)", "")


def _distinct(runs: Sequence[Run], keys: Sequence[str]) -> str:
    """Return the different values of `keys` in the runs; a dash is what a report does not say."""
    values = [[run.record.get(key) for key in keys] for run in runs]
    texts = {" ".join("-" if value is None else str(value) for value in line) for line in values}
    return "; ".join(sorted(texts))


def _markdown_distinct(runs: Sequence[Run], keys: Sequence[str]) -> str:
    return escape.cell(_distinct(runs, keys))
