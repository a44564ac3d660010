"""The record of bad images that a run met: counted in its report, listed in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitrim.data import Data
from vitrim.data.image_files import ImageFiles
from vitrim.files import write

QUARANTINE = "quarantine.json"
"""File in a run's folder that lists the bad images, by split and name, each with the reason."""


def reasons_by_split(data: Data | None) -> dict[str, dict[str, str]]:
    """Return why images that a run met are bad, by split and name; empty where none was."""
    return data.bad_images() if isinstance(data, ImageFiles) else {}


def report_entry(data: Data | None) -> dict[str, dict[str, int]]:
    """Return the report's entry: how many images were bad, by split; empty where none was."""
    numbers = {split: len(reasons) for split, reasons in reasons_by_split(data).items()}
    return {"bad_images": numbers} if numbers else {}


@contextmanager
def recorded(data: Data | None, folder: Path) -> Iterator[None]:
    """Write quarantine.json to `folder` at the end, after errors as well, if images were bad.

    The entries of an earlier, interrupted run stay in the list.
    """
    path = folder / QUARANTINE
    try:
        yield
    finally:
        current = reasons_by_split(data)
        if current:
            earlier = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            merged = {split: earlier.get(split, {}) | names for split, names in current.items()}
            text = json.dumps(earlier | merged, indent=1, ensure_ascii=False)
            write(path, lambda part: part.write_text(text, "utf-8"))
