"""What a run says in the terminal: what it is going to do, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

_WIDTHS = (18, 8, 10, 10, 16)


def opening(
    method: str, network: str, target: tuple[str, float], strength: float | None, seed: int
) -> str:
    """Return the line at the start of a run.

    >>> opening("vtp", "deit_base_patch16_224", ("params", 0.6), 3, 0)
    'vtp on deit_base_patch16_224: 0.6 of the params (strength 3), seed 0'

    Args:
        method: its name.
        network: its name.
        target: the metric, and what is kept of it: a fraction or a number.
        strength: that was asked for; None where a target was.
        seed: of the run.
    """
    metric, keep = target
    kept = f"{keep:g} of the {metric}" if 0 < keep <= 1 else f"{keep:,} {metric}"
    asked = "" if strength is None else f" (strength {strength:g})"
    return f"{method} on {network}: {kept}{asked}, seed {seed}"


def result_table(report: Mapping[str, object]) -> str:
    """Return the numbers of a report as a table: dense, cut and final network, or those there are.

    Accuracy is top-1 in percent, and latency in milliseconds for the report's batch. The control is
    the dense network, trained as long as the final one.
    """
    dense, compact = (cast(Mapping[str, object], report[side]) for side in ("dense", "compact"))
    stages = cast(Mapping[str, Mapping[str, object]], report["stages"])
    batch = cast(Mapping[str, object], report["latency"])["batch"]
    rows = [("", "top-1", "MACs", "params", f"ms (batch {batch})"), _row("dense", dense, dense)]
    for name, accuracy in [*stages.items()][:-1]:
        after = "after the cut" if name == "cut" else name
        rows.append((*_row(after, accuracy, compact)[:-1], ""))
    rows.append(_row("final", compact, compact))
    if "control" in report:
        rows.append(_row("control", cast(Mapping[str, object], report["control"]), dense))
    return "\n".join(
        "".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, _WIDTHS, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(
    name: str, accuracy: Mapping[str, object], counted: Mapping[str, object]
) -> tuple[str, str, str, str, str]:
    return (
        name,
        _number(accuracy.get("top1"), ".2f"),
        _large(counted["macs"]),
        _large(counted["params"]),
        _number(counted.get("latency_ms"), ".2f"),
    )


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _large(value: object) -> str:
    """Return a count with a unit.

    >>> _large(17_563_828_224), _large(86_567_656), _large(1234)
    ('17.56 G', '86.57 M', '1.23 k')
    """
    count = float(str(value))
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:g}"
