"""Compare our runs with the published rows that they reproduce."""

from __future__ import annotations

from collections.abc import Sequence

from vitrim.deploy.table import Lines, markdown_table
from vitrim.paper import Published, match, published
from vitrim.report.summary import Row, fixed

HEAD = [
    "row",
    "strength",
    "params",
    "delta",
    "FLOPs as published",
    "delta",
    "true FLOPs",
    "MB",
    "top-1",
    "published",
    "lost %",
    "published",
    "verified",
]
TITLE = "Comparison with published numbers"
NOTE = (
    "*delta* is ours minus the published number. FLOPs as published are counted as in the paper "
    "where its count differs from the true one; MB are params / 2^20, one byte each. *lost* is the "
    "loss of accuracy in percent of the dense accuracy: evaluations differ between papers, so "
    "compare it before the accuracies."
)


def comparison(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line per row that a paper published, ours first; a dash means unknown."""
    pairs = [(row, match(row.record)) for row in rows]
    return [_line(row, paper) for row, paper in pairs if paper is not None]


def _line(row: Row, paper: Published) -> list[str]:
    params, flops = row.record["compact.params"], row.record["compact.flops"]
    counted = row.record.get("compact.flops_blog", flops)
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
        fixed(row.record["strength"], "g"),
        f"{params:,}",
        _difference(params, paper.params),
        f"{counted:,}",
        _difference(counted, paper.flops),
        f"{flops:,}",
        f"{params / 2**20:.2f}",
        fixed(row.mean("compact.top1")),
        fixed(paper.top1),
        _lost(row.mean("compact.top1"), row.mean("dense.top1")),
        _lost(paper.top1, dense),
        paper.evidence_level,
    ]


def _difference(ours: int, theirs: int | None) -> str:
    return "-" if theirs is None else f"{ours - theirs:+,}" if ours != theirs else "0"


def _lost(accuracy: float | None, dense: float | None) -> str:
    if accuracy is None or not dense:
        return "-"
    return f"{100 * (dense - accuracy) / dense:.2f}"


def markdown(lines: Lines) -> list[str]:
    """Return the comparison as a section of Markdown; none if there is nothing to compare."""
    if not lines:
        return []
    return [f"## {TITLE}", "", *markdown_table([HEAD, *lines], left=1), "", NOTE, ""]
