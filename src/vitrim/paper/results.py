"""The measured results in the repository: results/*.json, each with command and provenance.

results/README.md has the format. `setting` is `paper` where a published row was run as its paper
says; `own` is everything else, which is comparable with no paper's number. The installed package
has no results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vitrim.errors import VitrimError

FOLDER = Path(__file__).parents[3] / "results"
"""Where the repository has its results."""

ABSENT = "Measured results are in vitrim's repository (results/*.json) only; none are shown here."

Figure = Mapping[str, str | int | float | None]
"""One line of a result: names and numbers; `experiment`, `strength` and `overrides` name a
published row."""

_SCHEMA: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("title", "setting", "command", "data", "hardware"), (str,)),
    **{"commit": (str, type(None)), "note": (str,), "versions": (dict,)},
    **{"seed": (int,), "figures": (list,)},
}


class ResultError(VitrimError):
    """A file of results/ that is not of the format."""


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


def results(folder: Path = FOLDER) -> list[Result]:
    """Return the results in `folder` by name; none where there is no such folder.

    Raises:
        ResultError: a file is not of the format; naming it and what is wrong.
    """
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> Result:
    try:
        content: object = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ResultError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != 1:
        raise ResultError(f"{path}: expected format 1 (results/README.md)")
    content = {"note": "", **content}
    wrong = [key for key in _SCHEMA if type(content.get(key, ...)) not in _SCHEMA[key]]
    wrong += sorted(set(content) - set(_SCHEMA))
    wrong = wrong or [f"figures.{i}" for i, line in enumerate(content["figures"]) if _bad(line)]
    if wrong or not content["figures"] or content["setting"] not in ("paper", "own"):
        what = ", ".join(wrong) or "no figures, or a setting other than paper and own"
        raise ResultError(
            f"{path}: missing, unknown or of a wrong type: {what} (results/README.md)"
        )
    return Result(name=path.stem, **content)


def _bad(line: object) -> bool:
    kinds = (str, int, float, type(None))
    return not isinstance(line, dict) or any(type(value) not in kinds for value in line.values())
