"""The reader of run folders: report.json, plan.json, diagnostics.json and recipe.yaml.

Every command that reads a run does it here, with one set of checks. Folders of version 0.1.0 are
read as well. Importing this module imports no torch; `vitrim.deploy.saved` reads the network.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitrim.errors import is_count
from vitrim.files import PHASES, PLAN, StoreError, printable, read_bytes, read_yaml
from vitrim.plan import MAX_BYTES, Plan, loads

REPORT, RECIPE, DIAGNOSTICS = "report.json", "recipe.yaml", "diagnostics.json"
FORMAT = 1
"""Version of report.json."""

Document = dict[str, Any]
"""A JSON or YAML file with nested keys."""
Record = Mapping[str, Any]
"""A report with nested keys joined by dots; `read_run` checks the types of the values."""

SETTINGS = ("latency.batch", "latency.device", "latency.precision", "latency.threads")
QUANTIZED = ("float_mb", "quantized.")
"""What the keys of int8 measurements begin with; only runs with int8 networks have them."""
EXPORTS, INT8_EXPORT = "export", "int8.json"
"""The folder of a run's exports, and the file there of what was measured in static int8."""
_INT8_NAMES = ("top1", "top5", "mb", "latency_ms")

_TEXT, _COUNT, _NUMBER, _MAYBE = (str,), (int,), (int, float), (int, float, type(None))
_SIDE = {"params": _COUNT, "macs": _COUNT, "top1": _MAYBE, "top5": _MAYBE, "latency_ms": _MAYBE}
_SIDES = {f"{side}.{name}": kinds for side in ("dense", "compact") for name, kinds in _SIDE.items()}
MEASURED = (*_SIDES, "cut.top1", "strength")
"""Keys of a record that are averaged over seeds."""
SAVED = ("dense.mb", "compact.mb")
"""Keys of the megabytes of saved networks, averaged as well; reports of 0.1.0 have none."""
CONTROL = "control.top1"
"""Key of the accuracy of the dense network that was trained as long; only with `control=true`."""
_REQUIRED: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("choices.method", "choices.model", "choices.data"), _TEXT),
    **dict.fromkeys(("series", "target.metric"), _TEXT),
    **dict.fromkeys(("target.keep", "kept.params", "kept.macs"), _NUMBER),
    **{"seed": _COUNT, "compact.flops": _COUNT},
    **{**_SIDES, "cut.top1": _MAYBE, "strength": _MAYBE},
}
_OPTIONAL: Mapping[str, tuple[type, ...]] = {
    **{"choices.experiment": (str, type(None)), "compact.flops_blog": _COUNT},
    **dict.fromkeys(SETTINGS, (*_MAYBE, str)),
    **dict.fromkeys((*SAVED, CONTROL, "control.top5"), _MAYBE),
    **dict.fromkeys(("evaluated_images", "dataset.classes"), (int, type(None))),
    **dict.fromkeys(("weights.name", "weights.source", "weights.sha256"), (str, type(None))),
}
_RENAMED = {"foretold": "predicted_latency"}
"""Keys of reports of version 0.1.0, and their names today."""
_MAX_REPORT, _MAX_RECIPE = 2**22, 2**20  # bytes
_MAX_KEYS, _MAX_TEXT, _MAX_NUMBER, _MAX_PATH = 10_000, 500, 2.0**63, 2_000
_MAX_SIDE, _MAX_CHANNELS = 2**16, 64
_LARGEST = {"top1": 100.0, "top5": 100.0, "strength": 5.0}


class RunFolderError(StoreError):
    """A folder without runs, or a file in a run folder that no run of vitrim wrote."""


class Run(NamedTuple):
    """A finished run: its folder and its report."""

    folder: Path
    record: Record


class Diagnostic(NamedTuple):
    """What a method saved for figures under one key.

    Args:
        where: the file and the key, for messages.
        value: unchecked JSON.
        notes: the provenance of the step that saved it.
        is_composed: whether the plan has several steps, one method after another.
    """

    where: str
    value: object
    notes: Mapping[str, object]
    is_composed: bool


def find_runs(roots: Sequence[Path], *, empty: bool = False) -> tuple[list[Path], list[Path]]:
    """Return the folders of the finished and of the unfinished runs below `roots`.

    Raises:
        RunFolderError: a root is no folder, or no root holds a finished run and not `empty`.
    """
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise RunFolderError(f"{root}: no such folder; a run makes it: vitrim out={root}")
        for name, children, names in os.walk(root):
            children[:] = sorted(set(children) - {PHASES})
            if REPORT in names or RECIPE in names:
                runs = finished if REPORT in names else unfinished
                runs.setdefault(Path(name).resolve(), Path(name))
    if not finished and not empty:
        raise RunFolderError(
            f"{', '.join(map(str, roots))}: no {REPORT} below ({len(unfinished)} unfinished runs); "
            "`vitrim` writes one at the end of each run, for example: vitrim strength=3"
        )
    return list(finished.values()), list(unfinished.values())


def read_run(folder: Path) -> Run:
    """Read and check the report of one run.

    The record has further keys: `label`, the method with the options that were given to it, and
    what was measured of exports in static int8, like the int8 networks of the report.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    path = folder / REPORT
    record = {**_exported(folder), **_flat(path, read_report(folder))}
    names = (record.get("choices.method"), record.get("variant"))
    record["label"] = " ".join(name for name in names if isinstance(name, str) and name)
    schema = {**_REQUIRED, **{key: _MAYBE for key in record if key.startswith(QUANTIZED)}}
    schema |= {key: kinds for key, kinds in _OPTIONAL.items() if key in record}
    wrong = [key for key, kinds in schema.items() if type(record.get(key, ...)) not in kinds]
    if wrong:
        raise RunFolderError(f"{path}: missing or of a wrong type: {', '.join(wrong)}")
    absurd = [ascii(key)[1:-1] for key, value in record.items() if not _is_sound(key, value)]
    if absurd or len(record) > _MAX_KEYS:
        raise RunFolderError(f"{path}: out of range, or no plain text: {', '.join(absurd[:5])}")
    return Run(folder, record)


def read_report(folder: Path) -> Document:
    """Return report.json with the keys of today.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    path = folder / REPORT
    report = _read_json(path, _MAX_REPORT)
    version = report.get("format") if isinstance(report, dict) else None
    if not isinstance(report, dict) or version != FORMAT:
        raise RunFolderError(
            f"{path}: format={reprlib.repr(version)}: expected {FORMAT}, from a `vitrim` run"
        )
    for old, new in _RENAMED.items():
        if old in report:
            report.setdefault(new, report.pop(old))
    return report


def read_classes(folder: Path) -> list[str]:
    """Return the names of the outputs of a saved network, in order; empty where none are recorded.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    if not (folder / REPORT).is_file():
        return []
    names = read_report(folder).get("classes", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunFolderError(f"{folder / REPORT}: classes: expected a list of names")
    return names


def read_recipe(folder: Path) -> Document:
    """Return recipe.yaml, empty where there is none; that of its run for an int8 network.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    path = folder_of_run(folder) / RECIPE
    if not path.is_file():
        return {}
    try:
        recipe = read_yaml(path, _MAX_RECIPE)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from None
    groups = ("model", "data")
    if not isinstance(recipe, dict) or any(type(recipe.get(g, {})) is not dict for g in groups):
        raise RunFolderError(f"{path} cannot be read: expected keys and values")
    wrong = [key for key, check in _OF_MODEL.items() if not check(recipe.get("model", {}).get(key))]
    if wrong:
        raise RunFolderError(f"{path}: of a wrong type or out of range: model.{wrong[0]}")
    return recipe


def folder_of_run(folder: Path) -> Path:
    """Return the folder of the run that saved the network in `folder`: its own, or the parent.

    The int8 networks of a run are in folders inside the run's.
    """
    inside = (folder / PLAN).is_file() and not (folder / RECIPE).is_file()
    parent = folder.absolute().parent
    return parent if inside and (parent / RECIPE).is_file() else folder


def _exported(folder: Path) -> Document:
    """Return what was measured of a run's exports in static int8.

    `float_ms` is the latency of the network in float in the same engine.
    """
    measured: Document = {}
    for path in sorted(folder.glob(f"{EXPORTS}/*/{INT8_EXPORT}")):
        content = _read_json(path, _MAX_REPORT)
        sides = content if isinstance(content, dict) else {}
        before, after = sides.get("float"), sides.get("int8")
        if not isinstance(before, dict) or not isinstance(after, dict):
            raise RunFolderError(f"{path}: expected what was measured in float and in int8")
        prefix = f"{QUANTIZED[1]}{path.parent.name}_int8_static"
        measured |= {f"{prefix}.{name}": after.get(name) for name in _INT8_NAMES}
        measured |= {f"{prefix}.float_ms": before.get("latency_ms"), "float_mb": before.get("mb")}
    return measured


def _is_side(value: object) -> bool:
    return value is None or (is_count(value) and value <= _MAX_SIDE)


def _are_pixels(value: object) -> bool:
    """Whether `value` is None or has a number per channel."""
    if value is None:
        return True
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_CHANNELS:
        return False
    return all(type(n) in (int, float) and abs(n) < _MAX_NUMBER for n in value)


_OF_MODEL: Mapping[str, Callable[[object], bool]] = {
    "image_size": _is_side,
    "mean": _are_pixels,
    "std": _are_pixels,
}
"""What a recipe says of the images of its network, and whether that can be so."""


def read_plan(folder: Path) -> Plan | None:
    """Return plan.json, or None where there is none.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        return loads(read_bytes(path, MAX_BYTES).decode(errors="replace"))
    except (ValueError, RecursionError, OSError) as error:
        raise RunFolderError(f"{path}: {error}; restore it or run again") from None


def read_diagnostic(folder: Path, key: str) -> Diagnostic | None:
    """Return what the method of a run saved under `key`, or None where it saved nothing.

    It is in diagnostics.json; version 0.1.0 wrote it to the provenance in plan.json.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    path, in_plan = folder / DIAGNOSTICS, folder / PLAN
    diagnostics = _read_json(path, MAX_BYTES) if path.is_file() else {}
    if not isinstance(diagnostics, dict):
        raise RunFolderError(f"{path}: expected an object")
    if key in diagnostics:
        steps, is_composed = _steps(read_plan(folder))
        return Diagnostic(f"{path}: {key}", diagnostics[key], steps[-1], is_composed)
    if not _mentions(in_plan, key):
        return None
    steps, is_composed = _steps(read_plan(folder))
    for step in reversed(steps):
        if key in step:
            return Diagnostic(f"{in_plan}: provenance.{key}", step[key], step, is_composed)
    return None


def _mentions(path: Path, key: str) -> bool:
    """Whether a JSON file may have this key: most plans do not, and need not be parsed."""
    if not path.is_file():
        return False
    try:
        return f'"{key}"'.encode() in read_bytes(path, MAX_BYTES)
    except StoreError:
        return True  # too large: `read_plan` says so
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror})") from None


def _steps(plan: Plan | None) -> tuple[Sequence[Mapping[str, object]], bool]:
    """Return the provenance of each method that made a plan, and whether one followed another."""
    provenance = {} if plan is None else plan.provenance
    steps = provenance.get("steps")
    if not isinstance(steps, list):
        return [provenance], False
    return [step for step in steps if isinstance(step, dict)] or [{}], True


def _read_json(path: Path, limit: int) -> object:
    try:
        content = read_bytes(path, limit).decode()
        return printable(json.loads(content, parse_constant=_refuse_constant))
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise RunFolderError(f"{path}: no valid JSON ({reason}); delete it and run again") from None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _flat(path: Path, report: Document) -> Document:
    """Return the values in `report`, nested keys joined by dots, in their order."""
    flat: Document = {}
    pending = [*reversed(report.items())]
    while pending:
        key, value = pending.pop()
        if len(flat) > _MAX_KEYS or len(key) > _MAX_PATH:
            raise RunFolderError(f"{path}: out of range, or no plain text: {key[:_MAX_TEXT]}")
        if isinstance(value, dict):
            pending += [(f"{key}.{name}", inner) for name, inner in reversed(value.items())]
        else:
            flat[key] = value
    return flat


def _is_sound(key: str, value: object) -> bool:
    """Whether an entry is one that a table can show."""
    if len(key) > _MAX_TEXT or not key.isprintable():
        return False
    match value:
        case str():
            return len(value) <= _MAX_TEXT and value.isprintable()
        case int() | float():
            return 0 <= value <= _LARGEST.get(key.rpartition(".")[2], _MAX_NUMBER)
    return True
