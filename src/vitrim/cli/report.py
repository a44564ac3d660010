"""The command `vitrim-report`: tables, figures and a page of finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vitrim.cli.arguments import folder_name, show_every_character, use_utf8
from vitrim.deploy.runfolder import Run, RunFolderError, find_runs, read_run
from vitrim.errors import VitrimError
from vitrim.files import escape
from vitrim.jobs.status import unfinished_lines
from vitrim.report import loss_figure, trial_figure
from vitrim.report.keep import keep
from vitrim.report.layout import PRINTED
from vitrim.report.rank_figures import read_curves
from vitrim.report.summary import budget_of, order, summarise
from vitrim.report.tables import OUTPUTS, show, show_papers, write
from vitrim.report.tracked import log_wandb


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error ends with one line on stderr and exit code 1, a bad flag with 2."""
    if argv is None:
        use_utf8("vitrim.cli.report")
    show_every_character()
    options = _parser().parse_args(argv)
    try:
        if options.paper:
            _show_papers(options.roots, options.out)
            return
        finished, unfinished = find_runs(options.roots)
        runs = _readable(finished)
        rows = summarise(runs)
        folder = (options.out or options.roots[0]) / "report"
        notes = unfinished_lines(unfinished, options.roots)
        kept = [] if options.keep is None else [keep(options.keep, runs)]
        chosen = {"page": options.html, "printed": options.print, "notes": notes}
        paths = [*write(folder, runs, rows, unfinished, **chosen), *kept]
    except (VitrimError, OSError) as error:
        print(f"vitrim-report: {escape.terminal(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    show(rows)
    lines = [*loss_figure.lines(runs), *trial_figure.lines(runs), f"unfinished: {len(notes)}"]
    lines += [f"  {note}" for note in notes]
    lines += map(str, paths)
    lines += [f"{run.folder}  {budget_of(run.record)} seed={run.record['seed']}" for run in runs]
    print(*map(escape.terminal, lines), sep="\n", flush=True)
    if options.wandb != "disabled":
        log_wandb(rows, paths[0], mode=options.wandb)


def _show_papers(roots: Sequence[Path], out: Path | None) -> None:
    """Compare the runs below `roots` with all published rows.

    Without runs, and without a folder for them, nothing is written and every row is "not run".
    """
    existing = [root for root in roots if root.is_dir() or roots != OUTPUTS]
    finished, _ = find_runs(existing, empty=True)
    folder = out or next(iter(existing), None)
    show_papers(_readable(finished), None if folder is None else folder / "report")


def _readable(folders: Sequence[Path]) -> list[Run]:
    """Return the runs that can be read, in order; print what is wrong with the others.

    Raises:
        RunFolderError: there are runs, and none can be read.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            run = read_run(folder)
            read_curves(run)
            trial_figure.trials_of(run)
            loss_figure.read_losses(run)
            runs.append(run)
        except RunFolderError as error:
            problems.append(str(error))
    if folders and not runs:
        raise RunFolderError("; ".join(problems))
    for problem in problems:
        print(f"vitrim-report: omitted: {escape.terminal(problem)}", file=sys.stderr)
    return sorted(runs, key=order)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vitrim-report", description=__doc__)
    add, modes = parser.add_argument, ("offline", "online", "disabled")
    add(
        "roots",
        nargs="*",
        type=folder_name,
        default=OUTPUTS,
        help="folders of runs (default: outputs)",
    )
    add("--paper", action="store_true", help="every published row, with ours where it was run")
    add(
        *("--out", "--to"),
        type=folder_name,
        metavar="DIR",
        help="write DIR/report/ (default: below the first folder of runs); --to is the former name",
    )
    add("--html", action="store_true", help="also write report.html: one page, with heat maps")
    add(
        "--print",
        choices=tuple(PRINTED),
        help="also write every figure as PDF and SVG in the width of a paper's text or column, "
        "and the tables in LaTeX",
    )
    add("--keep", metavar="NAME", help="also write results/NAME.json: the rows, with provenance")
    add("--wandb", choices=modes, default="offline", help="also log a W&B run (default: offline)")
    return parser
