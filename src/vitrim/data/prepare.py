"""A copy of a folder of images with their short side resized once, so that loading decodes less.

The copy has the same folders and names. What cannot be decoded, or is named after another class, is
left out and listed in its `prepared.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vitrim.data.defects import decode, mislabelled
from vitrim.data.folders import is_image
from vitrim.data.paths import Paths
from vitrim.data.reading import read_image
from vitrim.errors import ConfigError, is_count
from vitrim.files import own_folder, write

MANIFEST = "prepared.json"
"""File of the copy that says how it was made, how many images it has and which were left out."""
_BEGUN = ".preparing.json"
_LOSSLESS = ("PNG", "WEBP", "BMP", "PPM", "TIFF")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resizing:
    """How images are resized.

    Args:
        short: pixels of the short side; smaller images are copied as they are.
        quality: of JPEGs, 1 to 100.

    Raises:
        ConfigError: a value that cannot be.
    """

    short: int
    quality: int = 95

    def __post_init__(self) -> None:
        if not is_count(self.short):
            raise ConfigError(f"--short={self.short}: expected pixels, a whole number from 1 on")
        if not (is_count(self.quality) and self.quality <= 100):
            raise ConfigError(f"--quality={self.quality}: expected a whole number from 1 to 100")


Outcome = Literal["made", "copied", "kept"]
"""What became of an image: resized, copied, or there from the last time."""


def prepare(
    source: Path, out: Path, resizing: Resizing, *, workers: int
) -> Iterator[tuple[int, int]]:
    """Copy the images below `source`; yield how many are done, and how many there are.

    What an earlier call with the same settings has written is kept. The manifest is written last.

    Raises:
        ConfigError: there are no images, the folders lie in each other, or `out` was begun with
            other settings.
    """
    paths = _images(source, out)
    _begin(source, out, resizing)
    work = partial(_one, str(source), str(out), resizing)
    counts: Counter[tuple[str, Outcome]] = Counter()
    bad: dict[str, str] = {}
    yield 0, len(paths)
    with _mapped(workers) as mapped:
        for number, (name, outcome, reason) in enumerate(mapped(work, paths), 1):
            if outcome is None:
                bad[name] = reason
            else:
                counts[name.split("/")[0], outcome] += 1
            yield number, len(paths)
    splits = sorted({split for split, _ in counts})
    facts = {
        "format": 1,
        **asdict(resizing),
        "images": {
            split: {kind: n for (name, kind), n in sorted(counts.items()) if name == split}
            for split in splits
        },
        "left_out": dict(sorted(bad.items())),
    }
    write(out / MANIFEST, lambda part: part.write_text(json.dumps(facts, indent=1), "utf-8"))
    (out / _BEGUN).unlink(missing_ok=True)


def _images(source: Path, out: Path) -> Paths:
    """Return the paths of all images below `source`, relative to it."""
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder; expected SPLIT/CLASS/IMAGE below it")
    places = source.resolve(), out.resolve()
    if places[0] == places[1] or places[0] in places[1].parents or places[1] in places[0].parents:
        raise ConfigError(f"{out} and {source}: expected folders that do not lie in each other")
    paths = Paths.of(_names(source))
    if not paths:
        raise ConfigError(f"{source}: contains no image")
    return paths


def _names(source: Path) -> Iterator[str]:
    for root, folders, files in os.walk(source, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if is_image(name) and not name.startswith("."):
                yield os.path.relpath(f"{root}{os.sep}{name}", source)


def _begin(source: Path, out: Path, resizing: Resizing) -> None:
    """Make the folder, or refuse one that was begun with other settings."""
    own_folder(out)
    facts = {"source": str(source.resolve()), **asdict(resizing)}
    for name in (_BEGUN, MANIFEST):
        path = out / name
        if path.is_file():
            known = json.loads(path.read_text("utf-8"))
            other = {k: known[k] for k, value in facts.items() if known.get(k, value) != value}
            if other:
                listed = ", ".join(f"{key}={value}" for key, value in other.items())
                raise ConfigError(f"{out} was begun with {listed}: choose another folder for this")
    if not any((out / name).is_file() for name in (_BEGUN, MANIFEST)) and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty, and was not begun by vitrim-prepare")
    text = json.dumps(facts)
    write(out / _BEGUN, lambda part: part.write_text(text, "utf-8"))


@contextmanager
def _mapped(workers: int) -> Iterator[Any]:
    """Give a function like `map`, over processes, whose results come as they are ready."""
    if workers <= 1:
        yield map
        return
    with get_context("spawn").Pool(workers) as pool:
        yield partial(pool.imap_unordered, chunksize=16)


class _File:
    """A data set of one image: what `decode` reads."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[object, int]:
        return read_image(self.path), 0


def _one(source: str, out: str, resizing: Resizing, name: str) -> tuple[str, Outcome | None, str]:
    """Resize one image; return its name, and what became of it or why it is left out."""
    path, target, shown = Path(source, name), Path(out, name), name.replace(os.sep, "/")
    if mislabelled([str(path)]):
        return shown, None, "named after another class"
    if target.is_file():
        return shown, "kept", ""
    found = decode(_File(str(path)), 0, str(path))
    if isinstance(found, str):
        return shown, None, found
    image = found[0]
    assert isinstance(image, Image.Image)
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as opened:
        kind, exif = opened.format, opened.info.get("exif")
    scale = resizing.short / min(image.size)
    if scale >= 1 or kind not in ("JPEG", "MPO", *_LOSSLESS):
        write(target, lambda part: shutil.copyfile(path, part))
        return shown, "copied", ""
    width, height = (max(resizing.short, round(scale * side)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    options: dict[str, Any] = {"exif": exif} if exif else {}
    if kind in ("JPEG", "MPO"):
        kind, options = "JPEG", {**options, "quality": resizing.quality}
    elif kind == "WEBP":
        options["lossless"] = True
    write(target, lambda part: small.save(part, kind, **options))
    return shown, "made", ""
