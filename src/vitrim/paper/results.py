"""What we measured and committed: results/*.json, each with its command and provenance.

results/README.md has the format. `setting` is `paper` where a published row was run as its paper
says; `own` is everything else, which no paper's number stands beside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitrim.errors import ReportError

_PACKAGE = Path(__file__).parents[1]
FOLDERS = (_PACKAGE / "results", _PACKAGE.parents[1] / "results")
"""Where results are in the wheel, and in the repository."""

Figure = Mapping[str, str | int | float | None]
"""One line of a result: names and numbers, of which `experiment`, `strength` and `overrides` name a
published row."""

_SCHEMA: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("title", "setting", "command", "data", "hardware"), (str,)),
    **{"commit": (str, type(None)), "note": (str,), "versions": (dict,)},
    **{"seed": (int,), "figures": (list,)},
}


class Result(NamedTuple):
    """One file of results/."""

    name: str
    title: str
    setting: str
    command: str
    commit: str | None
    versions: Mapping[str, str]
    data: str
    hardware: str
    seed: int
    figures: Sequence[Figure]
    note: str

    @property
    def columns(self) -> list[str]:
        """The names of all figures, in their order."""
        return list(dict.fromkeys(name for figure in self.figures for name in figure))

    @property
    def provenance(self) -> str:
        """One line: where, when and with what this was measured."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit = "not kept" if self.commit is None else self.commit[:8]
        where = f"{self.data}; {self.hardware}; seed {self.seed}"
        return f"{where}; commit {commit}; {versions}. {self.note}".rstrip()


def results(folder: Path | None = None) -> list[Result]:
    """Return the results of `folder`, or those that come with vitrim, by name.

    Raises:
        ReportError: a file is not of the format; naming it and what is wrong.
    """
    found = folder or next((path for path in FOLDERS if path.is_dir()), None)
    return [] if found is None else [_read(path) for path in sorted(found.glob("*.json"))]


def _read(path: Path) -> Result:
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != 1:
        raise ReportError(f"{path}: expected format 1 (results/README.md)")
    content = {"note": "", **content}
    wrong = [key for key in _SCHEMA if type(content.get(key, ...)) not in _SCHEMA[key]]
    wrong += sorted(set(content) - set(_SCHEMA))
    wrong = wrong or [f"figures.{at}" for at, line in enumerate(content["figures"]) if _bad(line)]
    if wrong or not content["figures"] or content["setting"] not in ("paper", "own"):
        said = ", ".join(wrong) or "no figures, or a setting other than paper and own"
        raise ReportError(
            f"{path}: missing, unknown or of a wrong type: {said} (results/README.md)"
        )
    return Result(name=path.stem, **content)


def _bad(line: object) -> bool:
    kinds = (str, int, float, type(None))
    return not isinstance(line, dict) or any(type(value) not in kinds for value in line.values())
