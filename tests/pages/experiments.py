"""docs/experiments.md from the headers of conf/experiment/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

INTRODUCTION = """# Experiments

`experiment=NAME` selects a file of `conf/experiment/`. It sets keys and builds nothing. The texts
below are the headers of these files: which rows, the commands, the time, and the numbers to
expect. `python -m tests.pages` writes this page."""


def page(folder: Path) -> str:
    """Return docs/experiments.md."""
    paths = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }
    sections = [f"## {name}\n\n{body(path.read_text('utf-8'))}" for name, path in paths.items()]
    return "\n\n".join([INTRODUCTION, *sections]) + "\n"


def body(text: str) -> str:
    """Return the header of a file as Markdown: commands in blocks, a paragraph per entry."""
    return "\n\n".join(_paragraphs(_header(text)))


def _header(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        if "@package" not in line:
            yield line.removeprefix("#").removeprefix(" ")


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    prose: list[str] = []
    code: list[str] = []
    for line in lines:
        is_code = line.startswith("  ")
        starts = line.startswith(("Rows: ", "Time: ", "Expected: "))
        if code and not is_code:
            yield "```\n" + "\n".join(code) + "\n```"
            code = []
        if prose and (is_code or starts):
            yield "\n".join(prose)
            prose = []
        if is_code:
            code.append(line.removeprefix("  "))
        else:
            prose.append(line)
    if code:
        yield "```\n" + "\n".join(code) + "\n```"
    if prose:
        yield "\n".join(prose)
