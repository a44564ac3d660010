"""Keep what finished runs measured as a file of results/: one line per row, with its provenance."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import prod
from pathlib import Path

from vitrim.deploy.runfolder import CONTROL, Record, Run, read_recipe
from vitrim.errors import VitrimError
from vitrim.files import write
from vitrim.paper.results import Figure
from vitrim.report.summary import Row, budget_of, order, summarise

FOLDER = Path("results")
"""In the current folder, which is a clone of vitrim's repository."""
_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
_WITHOUT_FOLDER = ("digits", "none")
"""Data sets that are read from no folder."""


class KeepError(VitrimError):
    """Runs that are no table of one command, or a name that is taken or no name."""


def keep(name: str, runs: Sequence[Run], folder: Path = FOLDER) -> Path:
    """Write `folder`/`name`.json from the reports of finished runs and return its path.

    The rows are those of `vitrim-report`: means over seeds, with their sample deviation.

    Raises:
        KeepError: the name is taken or no name, the runs are not those of one command, commit and
            versions, or the checkout had changes that no commit has.
    """
    path = folder / f"{name}.json"
    if not _NAME.fullmatch(name):
        raise KeepError(f"--keep {name!r}: expected small letters, digits and _, as in vtp_digits")
    if path.exists():
        raise KeepError(f"--keep {name}: {path} exists; choose another name, or delete it first")
    text = json.dumps(result(runs), indent=1, ensure_ascii=False) + "\n"
    folder.mkdir(exist_ok=True)
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def result(runs: Sequence[Run]) -> Mapping[str, object]:
    """Return the content of a file of results/ (results/README.md has the format).

    Raises:
        KeepError: as `keep`.
    """
    records = [run.record for run in runs]
    if any(record.get("dirty") for record in records):
        raise KeepError(
            "--keep: a run was made by a checkout with changes that no commit has; commit them, "
            "and run again"
        )
    first = records[0]
    versions = {
        "vitrim": _same(records, "vitrim", "version"),
        **{
            key.removeprefix("versions."): str(_same(records, key, f"version of {key[9:]}"))
            for key in first
            if key.startswith("versions.")
        },
    }
    seeds = sorted({record["seed"] for record in records})
    return {
        "format": 1,
        "title": _title(records),
        "setting": "own",
        "command": command(records, checkpoint=any(map(_has_checkpoint, runs))),
        "commit": _same(records, "commit", "commit"),
        "versions": versions,
        "data": _joined(records, "choices.data"),
        "hardware": _hardware(records),
        "seed": seeds[0],
        "figures": _figures(runs),
        "note": f"Seeds {', '.join(map(str, seeds))}. From the report.json of the runs.",
    }


def _title(records: Sequence[Record]) -> str:
    """Return the method, the network, and the experiment if it is one."""
    title = _joined(records, "label") + " on " + _joined(records, "choices.model")
    words = {word for record in records for word in _overrides(record)}
    chosen = sorted(word.partition("=")[2] for word in words if _key(word) == "experiment")
    return ", ".join([title, *chosen])


def _has_checkpoint(run: Run) -> bool:
    """Whether a run began with the weights of a file, also where it trained them further."""
    model = read_recipe(run.folder).get("model", {})
    return isinstance(model, Mapping) and model.get("checkpoint") is not None


def command(records: Sequence[Record], *, checkpoint: bool = False) -> str:
    """Return the command line that makes these runs; folders are words in capitals.

    `checkpoint` says whether they began with the weights of a file.

    Raises:
        KeepError: no single command does.
    """
    lists = [[word for word in _overrides(record) if _key(word) != "seed"] for record in records]
    values: dict[str, dict[str, None]] = {}
    for words in lists:
        for word in words:
            values.setdefault(_key(word), {})[word.partition("=")[2]] = None
    seeds = sorted({record["seed"] for record in records})
    n_runs = len({(record["seed"], *words) for record, words in zip(records, lists, strict=True)})
    if any({*map(_key, words)} != {*values} for words in lists) or n_runs != prod(
        map(len, (seeds, *values.values()))
    ):
        raise KeepError(
            "--keep: these runs are not those of one command; keep the folders of each command "
            "under a name of its own"
        )
    words = [f"{key}={','.join(chosen)}" for key, chosen in values.items()]
    words += [f"seed={','.join(map(str, seeds))}"] if seeds != [0] else []
    if any(record["choices.data"] not in _WITHOUT_FOLDER for record in records):
        words.append("data.root=IMAGES")
    if checkpoint:
        words.append("model.checkpoint=WEIGHTS")
    multirun = ["-m"] if n_runs > 1 else []
    return " ".join(["vitrim", *multirun, *map(shlex.quote, words)])


def _overrides(record: Record) -> Sequence[str]:
    words = record.get("overrides")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise KeepError("--keep: a report has no overrides (of an earlier version): run it again")
    return words


def _key(word: str) -> str:
    return word.partition("=")[0]


def _figures(runs: Iterable[Run]) -> list[Figure]:
    """Return a line per row of `summarise`, with the seeds and recipes of its runs."""
    ordered = sorted(runs, key=order)
    groups = [[*group] for _, group in groupby(ordered, key=lambda run: order(run)[:-2])]
    return [_line(row, group) for row, group in zip(summarise(ordered), groups, strict=True)]


def _line(row: Row, group: Sequence[Run]) -> Figure:
    record, final = row.record, row.spreads["compact.top1"]
    return {
        "method": record["label"],
        "model": record["choices.model"],
        "budget": budget_of(record),
        "kept_macs_percent": _rounded(row.mean("kept_macs")),
        "kept_params_percent": _rounded(row.mean("kept_params")),
        "params": round(row.mean("compact.params") or 0),
        "top1_dense": _rounded(row.mean("dense.top1")),
        **({"top1_control": _rounded(row.mean(CONTROL))} if CONTROL in row.spreads else {}),
        "top1_after_the_cut": _rounded(row.mean("cut.top1")),
        "top1": _rounded(row.mean("compact.top1")),
        "top1_std": None if final is None else _rounded(final.std),
        "evaluated_images": record.get("evaluated_images"),
        "seeds": ", ".join(sorted({str(run.record["seed"]) for run in group})),
        "recipe_hash": ", ".join(sorted({str(run.record["recipe_hash"]) for run in group})),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _same(records: Sequence[Record], key: str, what: str) -> object:
    """Return the value that all records have.

    Raises:
        KeepError: they differ.
    """
    found = {str(record.get(key)) for record in records}
    if len(found) > 1:
        raise KeepError(f"--keep: the runs differ in the {what}: {', '.join(sorted(found))}")
    return records[0].get(key)


def _joined(records: Sequence[Record], key: str) -> str:
    return ", ".join(dict.fromkeys(str(record[key]) for record in records))


def _hardware(records: Sequence[Record]) -> str:
    """Return where the runs were made, as far as reports say it."""
    found = {
        f"{record.get('latency.device')}, {record.get('latency.threads')} threads"
        for record in records
    }
    return "; ".join(sorted(found))
