"""The command `vitrim-report`: runs of folders as tables, figures and a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vitrim.errors import ReportError
from vitrim.jobs.status import missing
from vitrim.report import trial_figure
from vitrim.report.rank_figures import read_curves
from vitrim.report.summary import Run, find, order, read, summarise
from vitrim.report.tables import OUTPUTS, _aim, beside_papers, log_wandb, show, write


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `vitrim-report` command; exit with 1 and one line on stderr where it cannot."""
    options = _parser().parse_args(argv)
    try:
        if options.paper:
            beside_papers(options.roots, options.to)
            return
        finished, unfinished = find(options.roots)
        runs = _sound(finished)
        rows = summarise(runs)
        folder = (options.to or options.roots[0]) / "report"
        absent = missing(unfinished, options.roots)
        paths = write(folder, runs, rows, unfinished, page=options.html, absent=absent)
    except (ReportError, OSError) as error:
        print(f"vitrim-report: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    show(rows)
    for line in trial_figure.lines(runs):
        print(line)
    print(f"unfinished: {len(absent)}", *absent, sep="\n  ")
    print(*paths, sep="\n")
    for run in runs:
        print(f"{run.folder}  {_aim(run.record)} seed={run.record['seed']}", flush=True)
    if options.wandb != "disabled":
        log_wandb(rows, paths[0], mode=options.wandb)


def _sound(folders: Sequence[Path]) -> list[Run]:
    """Read what can be read, in order; say what cannot.

    Raises:
        ReportError: that is all of it.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            run = read(folder)
            read_curves(run)
            trial_figure.trials_of(run)
            runs.append(run)
        except ReportError as error:
            problems.append(str(error))
    if not runs:
        raise ReportError("; ".join(problems))
    for problem in problems:
        print(f"vitrim-report: left out: {problem}", file=sys.stderr)
    return sorted(runs, key=order)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vitrim-report", description=__doc__)
    add, modes = parser.add_argument, ("offline", "online", "disabled")
    add("roots", nargs="*", type=Path, default=OUTPUTS, help="folders of runs (default: outputs)")
    add("--paper", action="store_true", help="every published row, ours beside it where it was run")
    add("--to", type=Path, metavar="DIR", help="write DIR/report/ (default: below the first root)")
    add("--html", action="store_true", help="write report.html, too: one page, with heat maps")
    add("--wandb", choices=modes, default="offline", help="log it there, too (default: offline)")
    return parser
