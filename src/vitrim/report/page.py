"""A report as one page of HTML that needs no other file: tables, figures and heat maps of plans.

Figures and one script are inlined, no font is loaded and no request made; everything is escaped,
and the page's policy lets no other script run. Links to the run folders are relative. Where scripts
are off, the page shows the same tables and figures, but no chart.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vitrim.deploy.runfolder import Run, read_plan
from vitrim.deploy.table import Lines
from vitrim.errors import VitrimError
from vitrim.files import escape
from vitrim.jobs.status import status_of
from vitrim.paper import Published, published
from vitrim.report import compare, loss_figure
from vitrim.report.block_figure import block_numbers
from vitrim.report.figure import dense_levels
from vitrim.report.heatmap import Heatmap, heatmap
from vitrim.report.summary import Row, Spread, budget_of, fixed, sections, summarise

_HERE = Path(__file__).parent
AXES = {
    "macs": (1e6, "MACs (M)"),
    "params": (1e6, "parameters (M)"),
    "mb": (1.0, "saved network (MB)"),
    "latency_ms": (1.0, "latency (ms)"),
}
"""What the chart draws the accuracy against: the size of the unit, and the label."""
_FILES = ("report.json", "plan.json", "recipe.yaml", "bench.json")


class Tables(NamedTuple):
    """The tables of a page, headings first, and the sentences that belong to them.

    `results` has caption, model and table of each; `losses` are pairs of a caption and a table.
    `losses`, `int8` and `compared` may be empty. `others` says which rows differ from the published
    row that they were started for.
    """

    results: Sequence[tuple[str, str, Lines]]
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
    method: str
    model: str
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
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    finished = [_finished(run, folder) for run in runs]
    rows, script = summarise(runs), (_HERE / "page.js").read_text("utf-8")
    blocks = {block for run in finished if run.map for block in run.map.blocks}
    return templates.get_template("page.html").render(
        runs=finished,
        unfinished=[_unfinished(run, folder) for run in unfinished],
        pictures=[(name, b64encode(content).decode()) for name, content in pictures.items()],
        alts=captions,
        losses_title=loss_figure.TITLE,
        comparison=compare.TITLE,
        comparison_note=compare.NOTE,
        not_run=not_run([paper for _, paper in compare.repeated(rows).pairs]),
        block_numbers={block: block_numbers(block) for block in blocks},
        tables=tables,
        choices={
            key: sorted({getattr(run, key) for run in finished}) for key in ("method", "model")
        },
        axes={key: label for key, (_, label) in AXES.items()},
        points=Markup(points(rows)),
        script=Markup(script),
        script_digest=f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}",
    )


def points(rows: Sequence[Row]) -> str:
    """Return the points of the chart as JSON for a script element: rows, and their dense networks.

    Each has the texts that hovering shows; nothing in them ends the element.
    """
    found = [_point(row, "compact", row.spreads["compact.top1"]) for row in rows]
    for part in sections(rows).values():
        accuracy = next((Spread(level, None, 1) for level in dense_levels(part)), None)
        found.append(_point(part[0], "dense", accuracy))
    text = json.dumps(found)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _point(row: Row, side: str, accuracy: Spread | None) -> Mapping[str, object]:
    """Return one point of the chart: the `compact` network of a row, or its `dense` one."""
    record = row.record
    costs = {key: row.mean(f"{side}.{key}") for key in AXES}
    known = {
        label: value / AXES[key][0]
        for key, value in costs.items()
        if value is not None
        for label in [AXES[key][1]]
    }
    model, data = record["choices.model"], record["choices.data"]
    label = "dense" if side == "dense" else f"{record['label']}, {budget_of(record)}"
    top1 = None if accuracy is None else accuracy.mean
    std = None if accuracy is None else accuracy.std
    shown = fixed(top1) + ("" if std is None else f" ± {std:.2f}")
    lines = [label, f"{model} on {data}", f"top-1 {shown} %"]
    lines += [f"{name}: {value:.4g}" for name, value in known.items()]
    return {
        "label": "dense" if side == "dense" else escape.html(record["label"]),
        "dense": side == "dense",
        "method": "" if side == "dense" else escape.html(record["label"].partition(" ")[0]),
        "model": escape.html(model),
        "top1": top1,
        "std": std,
        **{key: None if value is None else value / AXES[key][0] for key, value in costs.items()},
        "lines": [escape.html(line) for line in lines],
    }


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
        method=record["label"].partition(" ")[0],
        model=record["choices.model"],
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
