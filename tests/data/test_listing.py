"""Listings of many images are kept while no folder changes, and give the same images."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from vitrim.data import listing
from vitrim.data.content import _digest, _size
from vitrim.data.folders import read_split
from vitrim.data.paths import Paths, ascending
from vitrim.files import digest

NAMES = ("b/2.png", "a/1.jpg", "a/x/3.png", "a/note.txt", ".hidden/4.png", "c/.5.png")


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "KEPT_FROM", 1)
    monkeypatch.setattr(listing, "_SETTLED_NS", -(10**12))  # folders made just now count as old
    for name in NAMES:
        path = tmp_path / "split" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "split"


def kept(split: Path) -> list[Path]:
    return [*(split.parent / "cache" / "vitrim" / "listings").glob("*.npz")]


def test_a_listing_is_kept_and_gives_the_same_images(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_split(split)
    assert len(kept(split)) == 1
    monkeypatch.setattr("vitrim.data.folders._listing", None)
    again = read_split(split)
    for one in (first, again):
        assert {name: [*paths] for name, paths in one.images.items()} == {
            "a": [f"{split}/a/1.jpg", f"{split}/a/x/3.png"],
            "b": [f"{split}/b/2.png"],
            "c": [],
        }
        assert one.differs
        assert one.unread == {"a": ".txt (1)"}
        assert one.loose == []


@pytest.mark.parametrize("change", ["add", "remove", "rename", "class", "damage", "other"])
def test_a_listing_that_does_not_hold_is_made_again(
    split: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    read_split(split)
    (path,) = kept(split)
    time.sleep(0.01)  # the clock of the file system ticks
    match change:
        case "add":
            (split / "a" / "x" / "9.png").touch()
        case "remove":
            (split / "b" / "2.png").unlink()
        case "rename":
            (split / "b" / "2.png").rename(split / "b" / "3.png")
        case "class":
            (split / "d").mkdir()
        case "damage":
            content = bytearray(path.read_bytes())
            content[content.index(b"1.jpg")] ^= 255
            path.write_bytes(content)
        case "other":
            np.savez(path, facts=np.zeros(3, np.uint8))
    monkeypatch.setattr("vitrim.data.folders._listing", None)
    with pytest.raises(TypeError, match="NoneType"):
        read_split(split)


def test_folders_that_changed_just_now_are_not_kept(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_SETTLED_NS", 2 * 10**9)
    read_split(split)
    assert kept(split) == []


def test_a_cache_that_cannot_be_written_is_no_error(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (split.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(split.parent / "file"))
    assert len(read_split(split).images) == 3


def test_a_few_images_are_listed_anew(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "KEPT_FROM", 10_000)
    read_split(split)
    assert kept(split) == []


def test_paths_of_all_classes_share_one_buffer_and_those_of_some_do_not(split: Path) -> None:
    images = read_split(split).images
    parts = [part for part in images.values() if isinstance(part, Paths)]
    every = Paths.joined(parts)
    assert every.buffer is parts[0].buffer
    assert Paths.joined([parts[0][1:], parts[1]]).buffer is parts[0].buffer
    some = Paths.joined([parts[1], parts[0][:1]])
    assert [*some] == [f"{split}/b/2.png", f"{split}/a/1.jpg"]
    assert some == [*some]
    assert some[-1] == f"{split}/a/1.jpg"
    assert some.buffer is not parts[0].buffer
    with pytest.raises(IndexError):
        every[3]


def test_names_in_other_encodings_survive(split: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (split / "b" / name).touch()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    for _ in range(2):
        assert [*read_split(split).images["b"]] == [f"{split}/b/2.png", f"{split}/b/{name}"]


@pytest.mark.parametrize("names", [["r/a/1", "r/a/2", "r/b/1"], ["r/b/1", "r/a/1", "r/a-/0"]])
def test_the_digest_is_that_of_the_whole_list(names: list[str]) -> None:
    labels = [*range(len(names))]
    files = sorted(zip(names, labels, strict=True))
    shared = len(os.path.commonpath([min(names), max(names)]))
    whole = [[[n[shared:], label] for n, label in files], [_size(name) for name, _ in files]]
    assert _digest(Paths.of(names), labels) == digest(whole)
    assert _digest(names, labels) == digest(whole)
    assert [names[index] for index in ascending(names)] == sorted(names)
