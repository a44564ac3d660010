"""Files that are written atomically, and verified by a manifest of checksums.

`escape` writes texts of others into them. May import: versions and errors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import xxhash
import yaml

from vitrim.errors import ConfigError, VitrimError

FORMAT = 1
MANIFEST, PLAN, WEIGHTS = "manifest.json", "plan.json", "model.safetensors"
_MAX_MANIFEST = 2**20  # bytes
_MAX_FILES = 16
_FACTS = {"params", "name", "epochs", "logits"}
_MAX_YAML, _MAX_BRACKETS, _MAX_DEPTH = 2**16, 2000, 64
_CHARACTERS = 32  # of text that count as one value
_PLAIN_TAGS = "tag:yaml.org,2002:"
_DIGITS = {"sha256": re.compile("[0-9a-f]{64}"), "xxh3_128": re.compile("[0-9a-f]{32}")}
PHASES = "phases"
"""Folder of the results of phases, in a run folder and next to the run folders."""


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file atomically: `fill` writes a temporary file, which then replaces `path`."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        fill(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def writable(folder: Path) -> Path:
    """Create `folder`, check that a file can be written there, and return it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"out: cannot write to {folder} ({error}); choose another with out=DIR"
        ) from None
    return folder


def own_folder(folder: Path) -> None:
    """Create `folder`, unless there is a symbolic link of that name, which is not followed.

    Raises:
        StoreError: `folder` is a symbolic link, or no folder.
    """
    refuse_link(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise StoreError(f"{folder} is a file, and a folder is needed: move it away") from None


def refuse_link(path: Path) -> None:
    """Raise StoreError if `path` is a symbolic link, which somebody else may have set."""
    if path.is_symlink():
        raise StoreError(
            f"{path} is a symbolic link, and what is written there would land elsewhere: remove "
            "it, or choose another folder"
        )


class StoreError(VitrimError):
    """A file that is missing, damaged, not written by vitrim, or that does not fit its plan."""


def write_manifest(folder: Path, names: tuple[str, ...], **facts: object) -> None:
    """Write the manifest of `folder`: two checksums of each named file, and `facts`.

    SHA-256 identifies the content; XXH3-128, thirty times faster, detects damage at every load
    (neither protects against somebody who can also rewrite the manifest).
    """
    files = {
        name: {"sha256": sha256(folder / name), "xxh3_128": _xxh3(folder / name)} for name in names
    }
    text = _with_checksum({"format": FORMAT, "files": files, **facts})
    write(folder / MANIFEST, lambda path: path.write_text(text))


def verify(folder: Path, names: tuple[str, ...]) -> None:
    """Check the named files of `folder` against its manifest.

    Raises:
        StoreError: there is no manifest, or a file is missing or differs.
    """
    checksums = _checksums(folder)
    for name in names:
        entry = checksums.get(name)
        if entry is None or not (folder / name).is_file():
            raise StoreError(f"{folder / name} is missing: the folder is not complete")
        if _xxh3(folder / name) != entry["xxh3_128"]:
            raise StoreError(
                f"{folder / name} differs from its checksum in {MANIFEST}: it is damaged or was "
                "edited; restore it or run again into another folder"
            )


def _checksums(folder: Path) -> dict[str, dict[str, str]]:
    """Return the checksums of each file that the manifest of `folder` lists."""
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
    if text != _with_checksum(manifest):
        raise StoreError(f"{path} is damaged or was edited: its own checksum differs")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise StoreError(f"{path}: files: expected the two checksums of each file, by name")
    unknown = sorted(manifest.keys() - {"format", "files"} - _FACTS)
    if unknown or len(files) > _MAX_FILES:
        raise StoreError(
            f"{path}: unknown keys {unknown[:3]} or more than {_MAX_FILES} files: vitrim did not "
            "write it"
        )
    return files


def _is_entry(entry: object) -> bool:
    """Whether `entry` consists of the two checksums in hex."""
    return (
        isinstance(entry, dict)
        and entry.keys() == _DIGITS.keys()
        and all(
            isinstance(entry[k], str) and form.fullmatch(entry[k]) for k, form in _DIGITS.items()
        )
    )


def read_text(path: Path, limit: int) -> str:
    """Return the text of a file of up to `limit` bytes; invalid UTF-8 is replaced."""
    return read_bytes(path, limit).decode(errors="replace")


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of up to `limit` bytes.

    Raises:
        StoreError: it is larger, or a pipe, a socket or a device, which might never end.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise StoreError(f"{path}: no regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise StoreError(f"{path}: expected at most {limit:,} bytes")
    return content


def printable(value: object) -> object:
    """Return plain data whose texts can be written: characters that are none, by their number.

    Names of files in another encoding, and JSON of others, have such characters.
    """
    whole: list[object] = [value]
    pending: list[dict[object, object] | list[object]] = [whole]
    while pending:  # not by recursion: JSON of others may be deep
        container = pending.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, item in [*items]:
            match item:
                case str():
                    container[key] = _printable_text(item)
                case dict():
                    inner = {_printable_text(name): part for name, part in item.items()}
                    container[key] = inner
                    pending.append(inner)
                case list():
                    copied = [*item]
                    container[key] = copied
                    pending.append(copied)
    return whole[0]


def _printable_text(text: object) -> object:
    return text.encode(errors="backslashreplace").decode() if isinstance(text, str) else text


class YamlError(VitrimError):
    """A yaml file that is not plain data, or too large."""


def read_yaml(path: Path, limit: int = _MAX_YAML) -> object:
    """Return the plain data in a yaml file of others, which has up to `limit` bytes.

    Raises:
        YamlError: naming the file: no file, not plain data, or too large.
    """
    try:
        return yaml.load(read_checked(path, limit), Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"{path}: not plain yaml: {' '.join(str(error).split())}") from None


def read_checked(path: Path, limit: int = _MAX_YAML) -> str:
    """Return the text of a yaml file, which is plain data and small.

    Raises:
        YamlError: naming the file and what is wrong with it.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise YamlError(f"{path}: expected a file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    try:
        check_yaml(content, limit)
        return content.decode()
    except (YamlError, UnicodeDecodeError) as error:
        raise YamlError(f"{path}: {error}") from None


def check_yaml(content: bytes, limit: int = _MAX_YAML) -> None:
    """Refuse yaml that is not plain data, or too large with all aliases written out.

    Raises:
        YamlError: what is wrong with it.
    """
    try:
        small = len(content) <= limit and _is_small(content.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise YamlError(f"not plain yaml: {' '.join(str(error).split())}") from None
    if not small:
        raise YamlError(
            f"expected up to {limit:,} bytes, {_MAX_YAML:,} values with all aliases written out, "
            f"and {_MAX_DEPTH} levels"
        )


def _is_small(text: str) -> bool:
    """Whether the values in a yaml text stay few once its aliases are written out."""
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    if text.count("[") + text.count("{") > _MAX_BRACKETS:  # parsing takes quadratic time
        return False
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        tag = getattr(event, "tag", None)
        if tag is not None and (not tag.startswith(_PLAIN_TAGS) or "python" in tag):
            raise yaml.YAMLError(f"the tag {tag} can run code")
        match event:
            case yaml.CollectionStartEvent():
                open_nodes.append((event.anchor, 1))
                continue
            case yaml.CollectionEndEvent():
                anchor, size = open_nodes.pop()
                sizes[anchor] = size
            case yaml.AliasEvent():
                size = sizes.get(event.anchor, _MAX_YAML)  # endless if it contains itself
            case yaml.ScalarEvent():
                size = sizes[event.anchor] = 1 + len(event.value) // _CHARACTERS
            case _:
                continue
        anchor, size_before = open_nodes[-1]
        open_nodes[-1] = (anchor, size_before + size)
        if size_before + size > _MAX_YAML or len(open_nodes) > _MAX_DEPTH:
            return False
    return True


def _with_checksum(manifest: Mapping[str, object]) -> str:
    """Return the text of a manifest, with a checksum of its other keys."""
    rest = json.dumps(manifest, sort_keys=True)
    signed = {**manifest, "checksum": xxhash.xxh3_128_hexdigest(rest.encode())}
    return json.dumps(signed, indent=1, sort_keys=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _xxh3(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def digest(value: object) -> str:
    """Return eight hex digits that identify a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
