"""A report as one page of HTML that needs no other file: tables, figures and heat maps of plans.

No scripts, no fonts, figures inlined, everything escaped; links to the run folders are relative.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vitrim.deploy.runfolder import Run, read_plan
from vitrim.deploy.table import Lines
from vitrim.errors import VitrimError
from vitrim.files import escape
from vitrim.jobs.status import status_of
from vitrim.paper import Published, published
from vitrim.report import compare, loss_figure
from vitrim.report.block_figure import block_numbers
from vitrim.report.heatmap import Heatmap, heatmap
from vitrim.report.summary import budget_of, fixed, summarise

_FILES = ("report.json", "plan.json", "recipe.yaml", "bench.json")


class Tables(NamedTuple):
    """The tables of a page, headings first, and the sentences that belong to them.

    `results` and `losses` are pairs of a caption and a table; `losses`, `int8` and `compared` may
    be empty. `others` says which rows differ from the published row that they were started for.
    """

    results: Sequence[tuple[str, Lines]]
    int8: Lines
    int8_note: str
    compared: Lines
    others: Sequence[str]
    losses: Sequence[tuple[str, Lines]]
    losses_note: str
    front_note: str
    commits: str
    settings: str


class _Finished(NamedTuple):
    label: str
    link: str
    cells: list[str]
    files: list[tuple[str, str]]
    map: Heatmap | None
    problem: str


class _Unfinished(NamedTuple):
    name: str
    link: str
    status: str
    reason: str


def html(
    folder: Path,
    runs: Sequence[Run],
    unfinished: Sequence[Path],
    pictures: Mapping[str, bytes],
    tables: Tables,
    captions: Mapping[str, str],
) -> str:
    """Return the page that will be saved in `folder`.

    `pictures` are PNGs by name, and `captions` say what they show.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    finished = [_finished(run, folder) for run in runs]
    blocks = {block for run in finished if run.map for block in run.map.blocks}
    return templates.get_template("page.html").render(
        runs=finished,
        unfinished=[_unfinished(run, folder) for run in unfinished],
        pictures=[(name, b64encode(content).decode()) for name, content in pictures.items()],
        alts=captions,
        losses_title=loss_figure.TITLE,
        comparison=compare.TITLE,
        comparison_note=compare.NOTE,
        not_run=not_run([paper for _, paper in compare.repeated(summarise(runs)).pairs]),
        block_numbers={block: block_numbers(block) for block in blocks},
        tables=tables,
    )


def _printable(value: object) -> object:
    """Return a text in which every character can be printed; jinja escapes its tags."""
    return escape.html(value) if type(value) is str else value


def not_run(reproduced: Sequence[Published]) -> list[list[str]]:
    """Return headings, and a line per published row that is none of those reproduced."""
    head = ["paper", "table", "data set", "model", "method", "setting"]
    head += ["MACs G", "top-1", "verified"]
    return [
        head,
        *(
            [
                *(row.paper, row.table, row.dataset, row.model, row.method, row.setting),
                fixed(None if row.flops is None else row.flops / 2e9, ".3f"),
                fixed(row.top1),
                row.evidence_level,
            ]
            for row in published()
            if row not in reproduced
        ),
    ]


def _finished(run: Run, folder: Path) -> _Finished:
    record = run.record
    names = (record["label"], record["choices.model"], record["choices.data"], budget_of(record))
    kept, problem = _heatmap(run)
    return _Finished(
        label=f"{', '.join(names)}, seed {record['seed']}",
        link=_link(run.folder, folder),
        cells=[
            fixed(record["compact.top1"]),
            fixed(100 * record["kept.macs"], ".1f"),
            fixed(100 * record["kept.params"], ".1f"),
            fixed(record["compact.latency_ms"]),
        ],
        files=[
            (name, _link(run.folder / name, folder))
            for name in _FILES
            if (run.folder / name).is_file()
        ],
        map=kept,
        problem=problem,
    )


def _heatmap(run: Run) -> tuple[Heatmap | None, str]:
    """Return the heat map of a run's plan, or why there is none."""
    try:
        plan = read_plan(run.folder)
        if plan is None:
            return None, "There is no plan.json in its folder."
        kept = heatmap(plan)
    except VitrimError as error:
        return None, f"plan.json: {error}"
    return (kept, "") if kept.kinds else (None, "Nothing was removed.")


def _unfinished(path: Path, folder: Path) -> _Unfinished:
    return _Unfinished(f"{path.parent.name}/{path.name}", _link(path, folder), *status_of(path))


def _link(path: Path, folder: Path) -> str:
    return quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
