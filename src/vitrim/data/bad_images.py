"""Bad images of a run: found, counted, and listed in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitrim.data.few_shot import Few
from vitrim.data.images import Images
from vitrim.data.quarantine import Replacing, Strict
from vitrim.files import write


def found(data: Any) -> dict[str, dict[str, str]]:
    """Return why images that a run met are bad, by split and name; nothing where there are none."""
    if not isinstance(data, Images):
        return {}
    train = data.train.whole if isinstance(data.train, Few) else data.train
    reasons = {
        split: images.found()
        for split, images in (("training", train), ("evaluation", data.val))
        if isinstance(images, Replacing | Strict)
    }
    return {split: names for split, names in reasons.items() if names}


def counted(data: Any) -> dict[str, dict[str, int]]:
    """Return the report's entry: how many images were bad, by split; nothing where none was."""
    reasons = found(data)
    numbers = {split: len(names) for split, names in reasons.items()}
    return {"bad_images": numbers} if numbers else {}


@contextmanager
def listing(data: Any, folder: Path) -> Iterator[None]:
    """Leave quarantine.json in `folder` in the end, after errors too, if a bad image was met.

    What an earlier, interrupted run met stays on the list.
    """
    path = folder / "quarantine.json"
    try:
        yield
    finally:
        reasons = found(data)
        if reasons:
            before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            both = {split: before.get(split, {}) | names for split, names in reasons.items()}
            text = json.dumps(before | both, indent=1, ensure_ascii=False)
            write(path, lambda part: part.write_text(text, "utf-8"))
