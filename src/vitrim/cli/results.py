"""What a job returns to a sweep: the path of its report, or a number in it (`optimized_metric`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, cast

from hydra._internal.hydra import Hydra

from vitrim.cli.guard import wrap
from vitrim.deploy.runfolder import read_report
from vitrim.errors import ConfigError, shown

_COUNTS = ("params", "macs", "flops", "mb", "latency_ms", "latency_mean_ms", "latency_std_ms")
_ACCURACIES = ("top1", "top5")
KNOWN: dict[str, tuple[str, ...]] = {
    "compact": (*_ACCURACIES, *_COUNTS),
    "dense": (*_ACCURACIES, *_COUNTS),
    "cut": _ACCURACIES,
    "kept": ("params", "macs", "mb"),
    "seconds": ("total",),
}
"""Numbers that every report has."""
_OF_RUN = ("stages", "predicted_latency", "evaluated_images")
"""Entries that depend on the run: they are read when it is finished."""


def check_metric(cfg: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with `optimized_metric`, as far as it is known before the run."""
    key = cfg["optimized_metric"]
    if key is None:
        return []
    where = f"optimized_metric={shown(key)}"
    if not isinstance(key, str) or not key.strip():
        return [f"{where}: expected null or a key of report.json, such as compact.top1"]
    part, _, name = key.partition(".")
    if part in KNOWN and name not in KNOWN[part]:
        return [f"{where}: expected {part}.KEY, with one of {', '.join(KNOWN[part])}"]
    if part not in (*KNOWN, *_OF_RUN, *cfg["quantize"]):
        examples = "compact.top1, compact.latency_ms, kept.macs"
        return [f"{where}: report.json has no such number; it has {examples} and others"]
    if name in _ACCURACIES and cfg["data"].get("_target_") == "vitrim.data.none":
        return [f"{where}: data=none has no images, so that there is no accuracy"]
    return []


def result_of(report: str | Path, key: str | None) -> str | float:
    """Return the number `key` of a report, by its dotted name; without a key the report's path.

    Raises:
        ConfigError: the report has no such number.
    """
    if key is None:
        return str(report)
    node: object = read_report(Path(report).parent)
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    if type(node) not in (int, float):
        raise ConfigError(
            f"optimized_metric={key}: {report} has no such number, but {shown(node)}: choose "
            "another key of it"
        )
    return float(str(node))


def install() -> None:
    """Let the command print the reports of jobs that ran elsewhere: submitit's print to a log."""
    wrap(Hydra, "multirun", _printing)


def _printing(multirun: Callable[..., object]) -> Callable[..., object]:
    @wraps(multirun)
    def printed(hydra: Hydra, *args: object, **kwargs: object) -> object:
        returned = multirun(hydra, *args, **kwargs)
        if submits(cast(list[str], kwargs.get("overrides", args[-1] if args else ()))):
            batches = returned if isinstance(returned, list) else []
            for job in (job for batch in batches for job in batch):
                sys.stdout.write(f"{job.return_value}\n")
            sys.stdout.flush()
        return returned

    return printed


def submits(words: Iterable[str]) -> bool:
    """Whether the words of a command choose a launcher of submitit."""
    chosen = (word.partition("=") for word in words)
    return any(
        key.lstrip("+") == "hydra/launcher" and ("submitit" in name or name == "slurm")
        for key, _, name in chosen
    )
