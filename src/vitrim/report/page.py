"""A report as one page of HTML that needs no other file: tables, figures and heat maps of plans.

No scripts, no fonts, figures inlined, everything escaped; links to the run folders are relative.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vitrim.errors import VitrimError
from vitrim.jobs.status import became
from vitrim.paper import of_run, published
from vitrim.plan import MAX_BYTES, loads
from vitrim.report.heatmap import Map, left
from vitrim.report.summary import Run, fixed

ALTS = {
    "curve.png": "Accuracy against strength and against MACs",
    "energy.png": "Energy kept against the share of the full rank",
    "ranks.png": "Accuracy against kept parameters",
    "error.png": "Output error against rank",
    "scores.png": "Scores of trials against the accuracy that each block costs",
}
_FILES = ("report.json", "plan.json", "recipe.yaml", "bench.json")


class _Finished(NamedTuple):
    label: str
    link: str
    cells: list[str]
    files: list[tuple[str, str]]
    map: Map | None
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
    **parts: Any,
) -> str:
    """Return the page that will lie in `folder`.

    `pictures` are PNGs by name; `parts` the tables (lists of lines of cells, headings first) and
    sentences that page.html names.
    """
    places = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    finished = [_finished(run, folder) for run in runs]
    return places.get_template("page.html").render(
        runs=finished,
        unfinished=[_unfinished(run, folder) for run in unfinished],
        pictures=[(name, b64encode(content).decode()) for name, content in pictures.items()],
        alts=ALTS,
        absent=absent(runs),
        places={block: _short(block) for run in finished if run.map for block in run.map.blocks},
        **parts,
    )


def absent(runs: Sequence[Run]) -> list[list[str]]:
    """Return headings, and a line per published row that none of the runs reproduces."""
    found = [of_run(run.record) for run in runs]
    head = ["paper", "table", "model", "method", "setting", "MACs G", "top-1", "verified"]
    return [
        head,
        *(
            [
                *(row.paper, row.table, row.model, row.method, row.setting),
                fixed(None if row.flops is None else row.flops / 2e9, ".3f"),
                fixed(row.top1),
                "yes" if row.verified else "no",
            ]
            for row in published()
            if row not in found
        ),
    ]


def _finished(run: Run, folder: Path) -> _Finished:
    record = run.record
    aim = f"{record['target.metric']}={record['target.keep']}"
    if record["strength"] is not None:
        aim = f"strength {record['strength']:g}"
    names = (record["label"], record["choices.model"], record["choices.data"], aim)
    found, problem = _map(run)
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
        map=found,
        problem=problem,
    )


def _map(run: Run) -> tuple[Map | None, str]:
    """Return the heat map of a run's plan, or why there is none."""
    path = run.folder / "plan.json"
    if not path.is_file():
        return None, "There is no plan.json in its folder."
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1).decode(errors="replace")
    try:
        found = left(loads(text))
    except VitrimError as error:
        return None, f"plan.json: {error}"
    return (found, "") if found.kinds else (None, "Nothing was removed.")


def _unfinished(path: Path, folder: Path) -> _Unfinished:
    return _Unfinished(f"{path.parent.name}/{path.name}", _link(path, folder), *became(path))


def _link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _short(block: str) -> str:
    """Return the numbers in a block's path.

    >>> _short("layers.0.blocks.11")
    '0.11'
    """
    return ".".join(part for part in block.split(".") if part.isdigit())
