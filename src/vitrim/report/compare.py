"""Compare our runs with the published rows that they reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vitrim.deploy.runfolder import Record
from vitrim.deploy.table import Lines, markdown_table
from vitrim.files import escape
from vitrim.paper import Published, match, published
from vitrim.paper.agreement import differences
from vitrim.paper.counts import COUNTS
from vitrim.report.summary import LATENCY, Row, budget_of, fixed

HEAD = [
    "row",
    "data set",
    "images",
    "strength",
    "params",
    "delta",
    "FLOPs as published",
    "delta",
    "true FLOPs",
    "MB",
    "top-1",
    "published",
    "top-5",
    "published",
    "lost %",
    "published",
    "latency ms",
    "verified",
]
TITLE = "Comparison with published numbers"
NOTE = (
    "*delta* is ours minus the published number, 0 where they agree in all digits that were "
    "printed. FLOPs as published are counted as the paper counts them; MB are params / 2^20, one "
    "byte each. *lost* is the loss of accuracy in percent of the dense accuracy: evaluations "
    "differ between papers, so compare it before the accuracies. Only runs with the weights, data "
    "set, number of evaluated images and recipe of a row are compared with it. *latency* is ours, "
    "dense and compact: no paper measures on the same device."
)
_SAME_COUNT = 0.01
"""Relative difference of FLOPs that are counted alike."""


class Repeated(NamedTuple):
    """The rows that repeat a published one, and a sentence on each that differs from its row."""

    pairs: list[tuple[Row, Published]]
    others: list[str]


def repeated(rows: Sequence[Row]) -> Repeated:
    """Return which rows repeat a published row, and in what the others differ from theirs."""
    matched = [(row, paper) for row in rows if (paper := match(row.record)) is not None]
    found = [(row, paper, differences(row.record, paper)) for row, paper in matched]
    return Repeated(
        [(row, paper) for row, paper, differing in found if not differing],
        [
            f"{row.record['series']} {budget_of(row.record)}: not compared with {_name(paper)}: "
            f"{'; '.join(differing)}"
            for row, paper, differing in found
            if differing
        ],
    )


def _name(paper: Published) -> str:
    parts = (paper.paper, paper.table, paper.model, paper.method, paper.dataset)
    return ", ".join(filter(None, parts))


def comparison(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line per row that a paper published, ours first; a dash means unknown."""
    return [_line(row, paper) for row, paper in repeated(rows).pairs]


def counted_flops(record: Record, paper: Published) -> int | None:
    """Return the FLOPs of a run as the paper counts them; None where its report does not say."""
    key = COUNTS.get(paper.paper, "")
    counted = record.get(f"compact.paper_flops.{key}")
    if counted is None and key != "dcvit":  # of a report that has no other count
        counted = record.get("compact.flops_blog", record["compact.flops"])
    return counted if isinstance(counted, int) else None


class PublishedPoint(NamedTuple):
    """The published accuracy in percent of a row's setting, and its `params` and `macs` if known.

    MACs are left out where the paper counts otherwise than we do.
    """

    row: Row
    top1: float
    costs: dict[str, float]


def published_points(rows: Sequence[Row]) -> list[PublishedPoint]:
    """Return the published points of the rows that have their weights, data, images and recipe."""
    found = []
    for row, paper in repeated(rows).pairs:
        if paper.top1 is None or row.mean("compact.top1") is None:
            continue
        costs = {} if paper.params is None else {"params": float(paper.params)}
        counted = counted_flops(row.record, paper)
        if paper.flops is not None and _is_close(counted, row.record["compact.flops"]):
            costs["macs"] = paper.flops / 2
        found.append(PublishedPoint(row, paper.top1, costs))
    return found


def _is_close(counted: int | None, true: int) -> bool:
    return counted is not None and abs(counted - true) <= _SAME_COUNT * true


def difference(ours: float, theirs: float | None, step: float) -> float | None:
    """Return ours minus theirs; 0 where both have the same digits down to `step`.

    >>> difference(86_567_656, 86_600_000, 1e5), difference(86_549_999, 86_600_000, 1e5)
    (0, -50001)
    """
    if theirs is None:
        return None
    return 0 if abs(ours - theirs) <= step / 2 else ours - theirs


def _line(row: Row, paper: Published) -> list[str]:
    params, flops = row.record["compact.params"], row.record["compact.flops"]
    counted = counted_flops(row.record, paper)
    images = row.record.get("evaluated_images")
    dense = next(
        (
            other.top1
            for other in published()
            if (other.experiment, other.model, other.strength) == (paper.experiment, paper.model, 0)
        ),
        None,
    )
    return [
        paper.experiment,
        paper.dataset,
        "-" if images is None else f"{images:,}",
        fixed(row.record["strength"], "g"),
        f"{params:,}",
        _signed(difference(params, paper.params, paper.params_step)),
        "-" if counted is None else f"{counted:,}",
        "-" if counted is None else _signed(difference(counted, paper.flops, paper.flops_step)),
        f"{flops:,}",
        f"{params / 2**20:.2f}",
        fixed(row.mean("compact.top1")),
        fixed(paper.top1),
        fixed(row.mean("compact.top5")),
        fixed(paper.top5),
        _lost(row.mean("compact.top1"), row.mean("dense.top1")),
        _lost(paper.top1, dense),
        latency(row),
        paper.evidence_level,
    ]


def latency(row: Row) -> str:
    """Return our latency, dense and compact; papers measure on other devices."""
    dense, compact = (row.mean(key) for key in LATENCY)
    return "-" if dense is None or compact is None else f"{dense:.3g} -> {compact:.3g}"


def _signed(number: float | None) -> str:
    return "-" if number is None else f"{number:+,.0f}" if number else "0"


def _lost(accuracy: float | None, dense: float | None) -> str:
    if accuracy is None or not dense:
        return "-"
    return f"{100 * (dense - accuracy) / dense:.2f}"


def markdown(lines: Lines, others: Sequence[str] = ()) -> list[str]:
    """Return the comparison as a section of Markdown; none if there is nothing to compare.

    `others` are the sentences on rows that differ from their published one.
    """
    if not lines and not others:
        return []
    table = [*markdown_table([HEAD, *lines], left=2), "", NOTE, ""] if lines else []
    return [f"## {TITLE}", "", *table, *(f"* {escape.markdown(line)}" for line in others), ""]
