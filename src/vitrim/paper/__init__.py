"""Published numbers, with where they were read and whether that was checked.

`published.csv` has one line per row of a paper's table. `verified` is yes where the number was read
in a primary document or reproduced, no where it is second-hand or remembered. `experiment` and
`strength` say which of our runs is that row.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from vitrim.paper.aiminify import flops_blog

__all__ = ["Published", "flops_blog", "of_run", "published"]


class Published(NamedTuple):
    """A row of a paper's table; None is what the paper does not say.

    `params` and `flops` are numbers of things, `top1` and `top5` percent.
    """

    paper: str
    table: str
    dataset: str
    model: str
    method: str
    setting: str
    params: int | None
    flops: int | None
    top1: float | None
    top5: float | None
    source: str
    verified: bool
    experiment: str
    strength: float | None


@cache
def published() -> tuple[Published, ...]:
    """Return every published row."""
    text = (files("vitrim.paper") / "published.csv").read_text("utf-8")
    return tuple(_row(line) for line in csv.DictReader(text.splitlines()))


def of_run(record: Mapping[str, Any]) -> Published | None:
    """Return the row that a run reproduces, by its report's flat record, or None.

    That is the row of its experiment (or of its method and model of that name) and strength.
    """
    names = {
        record.get("choices.experiment"),
        f"{record['choices.method']}/{record['choices.model']}",
    }
    for row in published():
        if row.experiment in names and row.strength == record["strength"]:
            return row
    return None


def _row(line: Mapping[str, str]) -> Published:
    def number(name: str) -> float | None:
        return float(line[name]) if line[name] else None

    def whole(name: str, unit: float) -> int | None:
        value = number(name)
        return None if value is None else round(value * unit)

    macs = whole("macs_G", 1e9)
    return Published(
        **{name: line[name] for name in ("paper", "table", "dataset", "model", "method")},
        setting=line["setting"],
        params=whole("params_M", 1e6),
        flops=whole("flops_G", 1e9) or (None if macs is None else 2 * macs),
        top1=number("top1"),
        top5=number("top5"),
        source=line["source"],
        verified=line["verified"] == "yes",
        experiment=line["experiment"],
        strength=number("strength"),
    )
