"""All generated pages by path, and which of them differ from their files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from . import configuration, drawings, experiments, measured, readme

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def pages() -> dict[Path, str]:
    """Return the text of every generated file by its path."""
    kept = measured.read(ROOT / "results")
    return {
        DOCS / "results.md": measured.page(kept),
        DOCS / "configuration.md": configuration.page(ROOT / "conf"),
        DOCS / "experiments.md": experiments.page(ROOT / "conf" / "experiment"),
        DOCS / "tradeoff.svg": drawings.tradeoff(kept),
        DOCS / "pipeline.svg": drawings.pipeline(),
        ROOT / "README.md": filled((ROOT / "README.md").read_text("utf-8"), readme.tables(kept)),
    }


def changed() -> dict[Path, str]:
    """Return the generated files that are missing or whose text differs."""
    return {
        path: text
        for path, text in pages().items()
        if not path.is_file() or path.read_text("utf-8") != text
    }


def filled(text: str, parts: Mapping[str, str]) -> str:
    """Replace what is between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    >>> filled("<!-- begin a -->old<!-- end a -->", {"a": "new"})
    '<!-- begin a -->\\nnew\\n<!-- end a -->'
    """
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text, count = pattern.subn(lambda _, new=f"{begin}\n{part}\n{end}": new, text)
        if count != 1:
            raise ValueError(f"expected {begin} and {end} once, found {count}")
    return text
