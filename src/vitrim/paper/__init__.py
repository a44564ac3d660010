"""Published numbers, with the source of each and whether it was verified.

`published.csv` has one line per row of a paper's table. `evidence` says how its numbers are known:
`primary` (read in the paper, or in its authors' own page or code), `derived` (computed by the rules
of their code), `quoted` (read in another publication's table), `summary` (second-hand), `memory` or
`none` (not recovered). `verified` is no for the last three. `experiment`, `strength` and
`overrides` say which of our runs is that row; a row without an experiment has no command of ours.

May import: deploy, trainer, budget and what is below them; imports no torch itself.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from vitrim.deploy.runfolder import Record
from vitrim.paper.aiminify import flops_blog

__all__ = ["Published", "flops_blog", "match", "published"]

_RENAMED = {
    "only": "allowed_blocks",
    "spare": "protected",
    "reuse": "unit_selection",
    "dream.power": "synthetic.tv_exponent",
    "tuning.front": "tuning.freeze_tail",
    "extra": "extra_blocks",
    "together": "group_size",
}
"""Keys of methods in reports of version 0.1.0, and their names today, where rows have them."""


class Published(NamedTuple):
    """A row of a paper's table; None is what the paper does not say.

    `params` and `flops` are numbers of things, `top1` and `top5` percent. `params_step` and
    `flops_step` are the units of the last digit that was printed.
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
    evidence: str
    verified: bool
    experiment: str
    strength: float | None
    overrides: str
    params_step: float
    flops_step: float

    @property
    def evidence_level(self) -> str:
        """How reliable the numbers are: yes, quoted (read in another publication) or no."""
        if not self.verified:
            return "no"
        return "quoted" if self.evidence == "quoted" else "yes"

    @property
    def command(self) -> str:
        """What runs this row, without the folders of images and runs; empty where nothing does."""
        if not self.experiment:
            return ""
        strength = "" if self.strength is None else f"strength={self.strength:g}"
        return " ".join(
            filter(None, (f"vitrim experiment={self.experiment}", strength, self.overrides))
        )


@cache
def published() -> tuple[Published, ...]:
    """Return every published row."""
    text = (files("vitrim.paper") / "published.csv").read_text("utf-8")
    return tuple(_row(line) for line in csv.DictReader(text.splitlines()))


def match(record: Record) -> Published | None:
    """Return the row that a run was started for, or None (`agreement` says how they differ).

    That is the row of its experiment (or of its method and model of that name), strength and
    overrides; of several, the one with the most overrides. A run with other options of the method
    matches none.
    """
    names = {
        record.get("choices.experiment"),
        f"{record['choices.method']}/{record['choices.model']}",
    }
    rows = [
        row
        for row in published()
        if row.experiment in names
        and row.strength == record["strength"]
        and _method_options(row.overrides) == _options_of(record)
        and all(_agrees(override, record) for override in row.overrides.split())
    ]
    return max(rows, key=lambda row: len(row.overrides), default=None)


def _options_of(record: Record) -> set[str]:
    """Return the options of the method that a run was given, as overrides."""
    options = [word.partition("=") for word in str(record.get("variant") or "").split()]
    return {f"method.{_RENAMED.get(key, key)}={value}" for key, equals, value in options if equals}


def _method_options(overrides: str) -> set[str]:
    return {word for word in overrides.split() if word.startswith("method.")}


def _agrees(override: str, record: Record) -> bool:
    """Whether a run fits an override; True for overrides that no report records."""
    key, _, value = override.partition("=")
    match key.split("."):
        case ["model" | "data" | "method"]:
            return bool(record.get(f"choices.{key}") == value)
        case ["data", "samples"]:
            images = record.get("choices.data") != "none"
            return bool(images and record.get("samples") == int(value))
        case ["target", metric] if value != "null":
            target = (record.get("target.metric"), record.get("target.keep"))
            return target == (metric, float(value))
        case ["from_run"]:
            return bool(record.get("variant") == f"of {value.removesuffix('_RUN').lower()}")
        case _:
            return True


def _row(line: Mapping[str, str]) -> Published:
    def number(name: str) -> float | None:
        return float(line[name]) if line[name] else None

    def count(name: str, unit: float) -> int | None:
        value = number(name)
        return None if value is None else round(value * unit)

    def step(name: str, unit: float) -> float:
        return unit * 10.0 ** -len(line[name].partition(".")[2])

    macs = count("macs_G", 1e9)
    of_flops = step("flops_G", 1e9) if line["flops_G"] else step("macs_G", 2e9)
    return Published(
        **{name: line[name] for name in ("paper", "table", "dataset", "model", "method")},
        setting=line["setting"],
        params=count("params_M", 1e6),
        flops=count("flops_G", 1e9) or (None if macs is None else 2 * macs),
        top1=number("top1"),
        top5=number("top5"),
        source=line["source"],
        evidence=line["evidence"],
        verified=line["verified"] == "yes",
        experiment=line["experiment"],
        strength=number("strength"),
        overrides=line["overrides"],
        params_step=step("params_M", 1e6),
        flops_step=of_flops,
    )
