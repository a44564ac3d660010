"""Read the reports of finished runs and summarise them over seeds."""

from __future__ import annotations

import json
import os
import reprlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from vitrim.errors import ReportError

_TEXT, _COUNT, _NUMBER, _MAYBE = (str,), (int,), (int, float), (int, float, type(None))
_SIDE = {"params": _COUNT, "macs": _COUNT, "top1": _MAYBE, "top5": _MAYBE, "latency_ms": _MAYBE}
_MEASURED = {
    f"{side}.{name}": kind for side in ("dense", "compact") for name, kind in _SIDE.items()
}
_MEASURED |= {"cut.top1": _MAYBE, "strength": _MAYBE}
NAMES = ("label", "choices.model", "choices.data")
_SCHEMA: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("choices.method", *NAMES[1:], "series", "target.metric"), _TEXT),
    **dict.fromkeys(("target.keep", "kept.params", "kept.macs"), _NUMBER),
    **{"seed": _COUNT, "compact.flops": _COUNT, **_MEASURED},
}
_QUANTIZED = ("float_mb", "quantized.")  # of runs that were asked for it
LATENCY = ("dense.latency_ms", "compact.latency_ms")
SETTINGS = ("latency.batch", "latency.device", "latency.precision", "latency.threads")
_IF_THERE: Mapping[str, tuple[type, ...]] = {
    **{"choices.experiment": (str, type(None)), "compact.flops_blog": _COUNT},
    **dict.fromkeys(SETTINGS, (*_MAYBE, str)),
}
_MAX_BYTES, _MAX_KEYS, _MAX_TEXT, _MAX_NUMBER = 2**22, 10_000, 500, 2.0**63
_MOST = {"top1": 100.0, "top5": 100.0, "strength": 5.0}


class Run(NamedTuple):
    """A finished run: its folder, and its report with nested keys joined by dots."""

    folder: Path
    record: Mapping[str, Any]


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for a single value) and number of values."""

    mean: float
    std: float | None
    n: int


class Row(NamedTuple):
    """A series at one strength or target: the record of its first seed, the spreads over all."""

    record: Mapping[str, Any]
    spreads: Mapping[str, Spread | None]

    def mean(self, measure: str) -> float | None:
        """Return the mean over seeds, or None where nothing was measured."""
        found = self.spreads.get(measure)
        return None if found is None else found.mean


def find(roots: Sequence[Path], *, empty: bool = False) -> tuple[list[Path], list[Path]]:
    """Return the folders of the finished and of the unfinished runs below `roots`.

    Raises:
        ReportError: a root is no folder, or no root holds a finished run, unless it may be `empty`.
    """
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise ReportError(f"{root}: no such folder; a run makes it: vitrim out={root}")
        for name, children, files in os.walk(root):
            children[:] = sorted(set(children) - {"phases"})
            if "report.json" in files or "recipe.yaml" in files:
                found = finished if "report.json" in files else unfinished
                found.setdefault(Path(name).resolve(), Path(name))
    if not finished and not empty:
        names = ", ".join(map(str, roots))
        raise ReportError(
            f"{names}: no report.json below ({len(unfinished)} unfinished runs); "
            "`vitrim` writes one at the end of each run, for example: vitrim strength=3"
        )
    return list(finished.values()), list(unfinished.values())


def read(folder: Path) -> Run:
    """Read and check the report of one run.

    Raises:
        ReportError: naming the file and what is wrong with it.
    """
    path = folder / "report.json"
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES)  # of a larger one, a part: no valid JSON
        record = dict(_flat(json.loads(content.decode("utf-8"), parse_constant=_refuse)))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: no valid JSON ({error}); delete it and run again") from None
    if record.get("format") != 1:
        found = reprlib.repr(record.get("format"))
        raise ReportError(f"{path}: format={found}: expected 1, from a `vitrim` run")
    named = (record.get("choices.method"), record.get("variant"))
    record["label"] = " ".join(filter(None, map(_text, named)))
    schema = {**_SCHEMA, **{key: _MAYBE for key in record if key.startswith(_QUANTIZED)}}
    schema |= {key: kinds for key, kinds in _IF_THERE.items() if key in record}
    wrong = [key for key, kinds in schema.items() if type(record.get(key, ...)) not in kinds]
    if wrong:
        raise ReportError(f"{path}: missing or of a wrong type: {', '.join(wrong)}")
    absurd = [ascii(key)[1:-1] for key, value in record.items() if not _is_sound(key, value)]
    if absurd or len(record) > _MAX_KEYS:
        raise ReportError(f"{path}: out of range, or no plain text: {', '.join(absurd[:5])}")
    return Run(folder, record)


def _is_sound(key: str, value: object) -> bool:
    """Whether an entry is one that a table can show."""
    if len(key) > _MAX_TEXT or not key.isprintable():
        return False
    match value:
        case str():
            return len(value) <= _MAX_TEXT and value.isprintable()
        case int() | float():
            return 0 <= value <= _MOST.get(key.rpartition(".")[2], _MAX_NUMBER)
    return True


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else key)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def spread(values: Iterable[float | None]) -> Spread | None:
    """Summarise the values that are there.

    >>> spread([90.0, 92.0, None])
    Spread(mean=91.0, std=1.4142135623730951, n=2)
    >>> spread([90.0])
    Spread(mean=90.0, std=None, n=1)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), std, len(known))


def fixed(value: float | None, form: str = ".2f") -> str:
    """Return a number as tables show it; a dash stands for not measured."""
    return "-" if value is None else format(value, form)


def per_seed(records: Iterable[Mapping[str, Any]], measure: str) -> list[float]:
    """Return one value per seed: a seed that ran twice counts once, with its mean."""
    seeds: dict[int, list[float]] = {}
    for record in records:
        if record.get(measure) is not None:
            seeds.setdefault(record["seed"], []).append(record[measure])
    return [statistics.fmean(values) for values in seeds.values()]


def summarise(runs: Iterable[Run]) -> list[Row]:
    """Return a row per series, strength and target: series by name, the mildest cut first."""
    cells = groupby(sorted(runs, key=order), key=lambda run: order(run)[:-2])
    return [_row([_derive(run.record) for run in cell]) for _, cell in cells]


def order(run: Run) -> tuple[Any, ...]:
    """Sort by series, then the mildest cut first, then seed; all but the last two make a row."""
    record, strength = run.record, run.record["strength"]
    metric, keep = record["target.metric"], record["target.keep"]
    aim = (strength is None, strength or 0.0, metric, keep if metric == "blocks" else -keep)
    return (record["series"], *aim, record["seed"], str(run.folder))


def _derive(record: Mapping[str, Any]) -> dict[str, Any]:
    final, dense = record["compact.top1"], record["dense.top1"]
    delta = None if final is None or dense is None else final - dense
    kept = {f"kept_{name}": 100 * record[f"kept.{name}"] for name in ("macs", "params")}
    lost = {
        f"{key.removesuffix('top1')}delta": None if None in (final, value) else value - final
        for key, value in record.items()
        if key.startswith(_QUANTIZED) and key.endswith(".top1")
    }
    return {**record, **kept, **lost, "delta": delta}


def _row(records: Sequence[Mapping[str, Any]]) -> Row:
    quantized = sorted({key for record in records for key in record if key.startswith(_QUANTIZED)})
    measures = (*_MEASURED, "kept_macs", "kept_params", "delta", *quantized)
    spreads = {measure: spread(per_seed(records, measure)) for measure in measures}
    if len({tuple(map(record.get, SETTINGS)) for record in records}) > 1:
        spreads.update(dict.fromkeys(LATENCY))  # a mean over machines means nothing
    return Row(records[0], spreads)


def sections(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of each pair of model and data set."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.record[NAMES[1]], row.record[NAMES[2]]), []).append(row)
    return parts


def macs_unit(rows: Iterable[Row]) -> tuple[float, str]:
    """Return the size and the name of the unit that fits the largest network."""
    return (1e9, "G") if max(row.record["dense.macs"] for row in rows) >= 1e9 else (1e6, "M")
