"""Every published row of the four sources with our numbers; and our results in other settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vitrim.deploy.table import Lines
from vitrim.paper import Published, published
from vitrim.paper.results import Result
from vitrim.report.compare import counted_flops, difference, latency, repeated
from vitrim.report.summary import Row, fixed

SOURCES = ("VTP", "AIminify blog", "DC-ViT", "Mixed-rank (2402.06004)")
HEAD = [
    *("table", "network", "data set", "method"),
    *("params M", "ours", "delta"),
    *("MACs G", "ours", "delta"),
    *("top-1", "ours", "delta"),
    *("top-5", "ours", "latency ms"),
    *("evidence", "verified"),
]
NOT_RUN = "not run"
NOTE = (
    "A dash: not known. *delta* is ours minus the published number. *evidence* says how a "
    "published number is known: primary (read in the paper, or its authors' own page or code), "
    "derived (by the rules of their code), quoted (read in another publication's table), summary "
    "(second-hand), memory, none (not recovered). MACs are counted as the paper counts them; a "
    "delta of 0 agrees in all digits that were printed. A run is shown next to a row only if it "
    "has its weights, data set, number of evaluated images and recipe; without images it repeats "
    "the structure. Accuracies of AIminify are by an evaluation of its own: compare what is lost."
)


class Ours(NamedTuple):
    """Our numbers for a published row; None is what was not measured."""

    params: int | None
    flops: int | None
    top1: float | None
    top5: float | None = None
    latency: str = "-"


class Section(NamedTuple):
    """A table with its title, and notes below; its first `left` columns are texts."""

    title: str
    lines: Lines
    left: int
    notes: Sequence[str] = ()


def sections(rows: Sequence[Row], results: Sequence[Result]) -> list[Section]:
    """Return a section per source, and one per result that was measured in a setting of our own."""
    known, others = dict(_ours(rows, results)), repeated(rows).others
    papers = [
        Section(
            f"{source}: published and ours",
            [
                HEAD,
                *(_line(row, known.get(_key(row))) for row in published() if row.paper == source),
            ],
            left=4,
            notes=[line for line in others if f"not compared with {source}, " in line],
        )
        for source in SOURCES
    ]
    own = [_own(result) for result in results if result.setting == "own"]
    return [*papers, *own]


def commands() -> list[tuple[str, str]]:
    """Return the names of the rows that a command of ours runs, and that command."""
    return [
        (", ".join(filter(None, names)), words)
        for row in published()
        if row.paper in SOURCES and (words := row.command)
        for names in [(row.paper, row.table, row.model, row.dataset, row.method, row.setting)]
    ]


_Key = tuple[str, float | None, str]


def _key(row: Published) -> _Key:
    return (row.experiment, row.strength, row.overrides)


def _ours(rows: Sequence[Row], results: Sequence[Result]) -> Iterator[tuple[_Key, Ours]]:
    """Iterate over our numbers, the best last: results, runs without images, runs with them."""
    for result in results:
        if result.setting == "paper":
            for figure in result.figures:
                yield _committed(figure)
    ordered = sorted(rows, key=lambda row: row.mean("compact.top1") is not None)
    for row, paper in repeated(ordered).pairs:
        flops = counted_flops(row.record, paper)
        yield (
            _key(paper),
            Ours(
                row.record["compact.params"],
                flops,
                row.mean("compact.top1"),
                row.mean("compact.top5"),
                latency(row),
            ),
        )


def _committed(figure: Mapping[str, str | int | float | None]) -> tuple[_Key, Ours]:
    def number(name: str) -> float | None:
        value = figure.get(name)
        return None if value is None else float(value)

    flops_key = "paper_flops" if "paper_flops" in figure else "flops"
    params, flops = number("params"), number(flops_key)
    ours = Ours(
        None if params is None else round(params),
        None if flops is None else round(flops),
        number("top1"),
    )
    key = (str(figure.get("experiment")), number("strength"), str(figure.get("overrides") or ""))
    return key, ours


def _line(row: Published, ours: Ours | None) -> list[str]:
    params, flops, top1, top5, compact_ms = ours or Ours(None, None, None)
    return [
        row.table,
        row.model,
        row.dataset,
        ", ".join(filter(None, (row.method, row.setting))),
        *_triple(row.params, params, 1e6, row.params_step),
        *_triple(row.flops, flops, 2e9, row.flops_step),
        *_triple(row.top1, top1),
        *(fixed(row.top5), fixed(top5), compact_ms),
        row.evidence,
        row.evidence_level,
    ]


def _triple(
    theirs: float | None, ours: float | None, unit: float = 1, step: float = 0
) -> list[str]:
    """Return a published number, ours and the difference, in this unit."""
    form = ".2f" if unit == 1 else ".3f"
    delta = None if ours is None else difference(ours, theirs, step)
    return [
        fixed(None if theirs is None else theirs / unit, form),
        NOT_RUN if ours is None else fixed(ours / unit, form),
        "-" if delta is None else f"{delta / unit:+{form}}" if delta else "0",
    ]


def _own(result: Result) -> Section:
    head = [name.replace("_", " ") for name in result.columns]
    lines = [[_cell(figure.get(name)) for name in result.columns] for figure in result.figures]
    note = f"{result.command}. {result.provenance}"
    return Section(f"Our own setting: {result.title}", [head, *lines], left=1, notes=[note])


def _cell(value: str | int | float | None) -> str:
    return "-" if value is None else str(value)
