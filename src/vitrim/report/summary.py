"""Summarise the records of finished runs over their seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from vitrim.deploy.runfolder import CONTROL, MEASURED, QUANTIZED, SAVED, SETTINGS, Record, Run

NAMES = ("label", "choices.model", "choices.data")
"""Keys of a record that name a row: method with its options, model, data set."""
LATENCY = ("dense.latency_ms", "compact.latency_ms")


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for a single value) and number of values."""

    mean: float
    std: float | None
    n: int


class Row(NamedTuple):
    """A series at one strength or target: the record of its first seed, the spreads over all."""

    record: Record
    spreads: Mapping[str, Spread | None]

    def mean(self, measure: str) -> float | None:
        """Return the mean over seeds, or None where nothing was measured."""
        spread = self.spreads.get(measure)
        return None if spread is None else spread.mean


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Summarise the values that are not None.

    >>> spread_of([90.0, 92.0, None])
    Spread(mean=91.0, std=1.4142135623730951, n=2)
    >>> spread_of([90.0])
    Spread(mean=90.0, std=None, n=1)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), std, len(known))


def fixed(value: float | None, form: str = ".2f") -> str:
    """Return a number as tables show it; a dash means not measured."""
    return "-" if value is None else format(value, form)


def budget_of(record: Record) -> str:
    """Return how strongly a run compressed, as on its command line.

    >>> budget_of({"strength": 3.0})
    'strength=3'
    >>> budget_of({"strength": None, "target.metric": "macs", "target.keep": 0.6})
    'macs=0.6'
    """
    if record["strength"] is None:
        return target_of(record)
    return f"strength={record['strength']:g}"


def target_of(record: Record) -> str:
    """Return the target of a run, by strength or not: its metric and what is kept of it."""
    return f"{record['target.metric']}={record['target.keep']}"


def per_seed(records: Iterable[Record], measure: str) -> list[float]:
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


def order(run: Run) -> tuple[str, bool, float, str, float, str, int, str]:
    """Sort by series, then the mildest cut first, then seed; all but the last two make a row.

    Runs on other weights or images, or on fewer images, are rows of their own.
    """
    record, strength = run.record, run.record["strength"]
    metric, keep = record["target.metric"], record["target.keep"]
    mildest_first = keep if metric == "blocks" else -keep
    budget = (strength is None, strength or 0.0, metric, mildest_first)
    evaluated = [record.get(key) for key in ("evaluated_images", "dataset.content")]
    if record.get("weights.source") in ("timm", "checkpoint"):  # others depend on the seed
        evaluated.append(record.get("weights.sha256"))
    return (record["series"], *budget, repr(evaluated), record["seed"], str(run.folder))


def _derive(record: Record) -> Record:
    final, dense = record["compact.top1"], record["dense.top1"]
    control = record.get(CONTROL)
    delta = None if final is None or dense is None else final - dense
    compared = {} if None in (final, control) else {"to_control": final - control}
    kept = {f"kept_{name}": 100 * record[f"kept.{name}"] for name in ("macs", "params")}
    int8_deltas = {
        f"{key.removesuffix('top1')}delta": None if None in (final, value) else value - final
        for key, value in record.items()
        if key.startswith(QUANTIZED) and key.endswith(".top1")
    }
    return {**record, **kept, **int8_deltas, **compared, "delta": delta}


def _row(records: Sequence[Record]) -> Row:
    quantized = sorted({key for record in records for key in record if key.startswith(QUANTIZED)})
    control = [key for key in (CONTROL, "to_control") if any(key in record for record in records)]
    measures = (*MEASURED, *SAVED, "kept_macs", "kept_params", "delta", *control, *quantized)
    spreads = {measure: spread_of(per_seed(records, measure)) for measure in measures}
    settings = {tuple(map(record.get, SETTINGS)) for record in records}
    unknown = any(None in setting for setting in settings)  # of earlier versions: threads
    if len(records) > 1 and (len(settings) > 1 or unknown):
        latencies = [measure for measure in spreads if measure.endswith("_ms")]
        spreads.update(dict.fromkeys(latencies))  # a mean over machines means nothing
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
