"""docs/configuration.md from the yaml files of conf/: keys, defaults, and what comments say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .experiments import body

INTRODUCTION = """# Configuration

`vitrim KEY=VALUE ...` sets keys; `-m` with comma-separated values runs all combinations. `vitrim
--help` lists the groups, and `vitrim --cfg job` prints the whole configuration of a run. Every
key with its default, unit and source is below, as the files of `conf/` have it. `python -m
tests.pages` writes this page from them.

A file may include others: their keys are valid there as well. `???` must be set."""
GROUPS = {
    "run": "The run",
    "method": "Methods: `method=`",
    "data": "Images: `data=`",
    "model": "Networks: `model=`",
    "trainer": "Trainers: `trainer=`",
    "teacher": "Teachers: `teacher=`",
    "eval": "`vitrim-eval`",
    "hydra/launcher": "Launchers: `hydra/launcher=`",
}
_KEY = re.compile(r"^(\s*)([A-Za-z_][\w/]*):(?:\s+(.*))?$")


class Entry(NamedTuple):
    """A key with its default and what the file says of it."""

    key: str
    value: str
    says: str


def page(conf: Path) -> str:
    """Return docs/configuration.md."""
    return "\n\n".join([INTRODUCTION, *(_group(conf, *item) for item in GROUPS.items())]) + "\n"


def _group(conf: Path, group: str, title: str) -> str:
    single = conf / f"{group}.yaml"
    paths = [single] if single.is_file() else sorted((conf / group).glob("*.yaml"))
    paths += [] if single.is_file() else sorted((conf / group / "base").glob("*.yaml"))
    parts = [f"## {title}"]
    for path in paths:
        if path != single:
            parts.append(f"### {path.relative_to(conf).with_suffix('')}")
        parts += _file(path.read_text("utf-8"))
    return "\n\n".join(parts)


def _file(text: str) -> Iterator[str]:
    lines = text.splitlines()
    head = []
    while lines and lines[0].startswith("#"):
        head.append(lines.pop(0))
    if head:
        yield body("\n".join(head))
    if chosen := _listed(lines, r"  - (\w+): ([a-z]\w*)"):
        yield "Chosen by default: " + ", ".join(f"`{key}={value}`" for key, value in chosen) + "."
    if included := _listed(lines, r"  - (?!_self_)([\w/]+)(@[\w.]+)?"):
        yield "Includes " + ", ".join(f"`{name}`" for name, _ in included) + "."
    entries = [*_entries(lines)]
    target = next((entry.value for entry in entries if entry.key == "_target_"), None)
    if target:
        yield f"Builds `{target}`."
    shown = [entry for entry in entries if entry.value or entry.says]
    listed = [_item(entry) for entry in shown if not entry.key.endswith("_target_")]
    if listed:
        yield "\n".join(listed)


def _listed(lines: list[str], pattern: str) -> list[tuple[str, ...]]:
    """Return the parts of the lines of a list of defaults that a pattern describes."""
    if "defaults:" not in lines:
        return []
    found = (re.fullmatch(pattern, line) for line in lines)
    return [match.groups() for match in found if match and match[2] != "null"]


def _item(entry: Entry) -> str:
    value = f" = `{entry.value}`" if entry.value else ""
    return f"* `{entry.key}`{value}" + (f": {entry.says}" if entry.says else "")


def _entries(lines: list[str]) -> Iterator[Entry]:
    """Return the keys in order, nested ones joined by dots, with the comments around them."""
    above: list[str] = []
    stack: list[tuple[int, str]] = []
    entry: Entry | None = None
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("#"):
            comment = stripped.removeprefix("#").strip()
            if entry is not None and entry.says and _continues(entry.says):
                entry = entry._replace(says=f"{entry.says} {comment}")
            else:
                above.append(comment)
            continue
        if not stripped and entry is not None:
            yield entry
            entry = None
        found = _KEY.match(line)
        if found is None:
            continue
        if entry is not None:
            yield entry
        indent = len(found[1])
        stack = [item for item in stack if item[0] < indent] + [(indent, found[2])]
        value, says = _value(found[3] or "")
        says = " ".join(filter(None, [" ".join(above), says]))
        above = []
        entry = Entry(".".join(name for _, name in stack), value, says)
        if stack[0][1] in ("defaults", "hydra", "setup"):
            entry = None
    if entry is not None:
        yield entry


def _continues(says: str) -> bool:
    """Whether a comment is unfinished: the next comment line belongs to it."""
    return not says.endswith((".", ")", ":"))


def _value(text: str) -> tuple[str, str]:
    """Return the default of a key and the comment in its line."""
    if text.startswith("#"):
        return "", text.removeprefix("#").strip()
    value, _, says = text.partition(" #")
    return value.strip(), says.strip()
