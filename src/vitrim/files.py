"""Files: written in one step, named by digests, and guarded by a manifest of checksums."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import xxhash

from vitrim.errors import ConfigError, VitrimError

FORMAT = 1
MANIFEST, PLAN, WEIGHTS = "manifest.json", "plan.json", "model.safetensors"
_MAX_MANIFEST = 2**20  # bytes
_MAX_FILES = 16
_FACTS = {"params", "name", "epochs"}
_DIGITS = {"sha256": re.compile("[0-9a-f]{64}"), "xxh3_128": re.compile("[0-9a-f]{32}")}
PHASES = "phases"
"""Folder of the results of phases, in a run folder and beside the run folders."""


def write(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write a file beside `path`, flush it, and put it in `path`'s place at once."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        fill(part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o644)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def writable(folder: Path) -> Path:
    """Make `folder` and return it, once a file could be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"out: cannot write to {folder} ({error}); out=DIR moves it") from None
    return folder


class StoreError(VitrimError):
    """A file that is missing, damaged, of a foreign kind, or that does not fit its plan."""


def seal(folder: Path, names: tuple[str, ...], **facts: Any) -> None:
    """Write the manifest of `folder`: two checksums of each named file, and `facts`.

    SHA-256 names the content for the record; XXH3-128, thirty times as fast, guards every load
    against damage (neither guards against somebody who can rewrite the manifest too).
    """
    files = {
        name: {"sha256": sha256(folder / name), "xxh3_128": _xxh3(folder / name)} for name in names
    }
    text = _signed({"format": FORMAT, "files": files, **facts})
    write(folder / MANIFEST, lambda path: path.write_text(text))


def verify(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Check the named files of `folder` against its manifest and return the manifest.

    Raises:
        StoreError: no manifest, or a file is missing or differs.
    """
    manifest = _manifest(folder)
    for name in names:
        entry = manifest["files"].get(name)
        if entry is None or not (folder / name).is_file():
            raise StoreError(f"{folder / name} is missing: not a complete folder of vitrim")
        if _xxh3(folder / name) != entry["xxh3_128"]:
            raise StoreError(
                f"{folder / name} differs from its checksum in {MANIFEST}: it is damaged or was "
                "edited; restore it or run again into another folder"
            )
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{path} is missing: expected a folder that vitrim saved")
    text = read_text(path, _MAX_MANIFEST)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path}: expected format {FORMAT}")
    manifest.pop("checksum", None)
    if text != _signed(manifest):
        raise StoreError(f"{path} is damaged or was edited: its own checksum differs")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise StoreError(f"{path}: files: expected the two checksums of each file, by name")
    unknown = sorted(manifest.keys() - {"format", "files"} - _FACTS)
    if unknown or len(files) > _MAX_FILES:
        raise StoreError(
            f"{path}: unknown keys {unknown[:3]} or more than {_MAX_FILES} files: not of vitrim"
        )
    return manifest


def _is_entry(entry: object) -> bool:
    """Whether `entry` holds two checksums in hex, and nothing else."""
    return (
        isinstance(entry, dict)
        and entry.keys() == _DIGITS.keys()
        and all(
            isinstance(entry[k], str) and form.fullmatch(entry[k]) for k, form in _DIGITS.items()
        )
    )


def read_text(path: Path, limit: int) -> str:
    """Return what is in a file of up to `limit` bytes; what is no text there is replaced."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise StoreError(f"{path}: expected at most {limit:,} bytes")
    return content.decode(errors="replace")


def _signed(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest with a checksum of the rest of it."""
    rest = json.dumps(manifest, sort_keys=True)
    signed = {**manifest, "checksum": xxhash.xxh3_128_hexdigest(rest.encode())}
    return json.dumps(signed, indent=1, sort_keys=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _xxh3(path: Path) -> str:
    if not path.stat().st_size:  # cannot be mapped
        return xxhash.xxh3_128_hexdigest(b"")
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)


def digest(value: Any) -> str:
    """Return eight hex digits that identify a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
