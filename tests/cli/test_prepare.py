"""vitrim-prepare resizes once, goes on where it was, and finds bad images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nets import images_in
from vitrim.cli.prepare import main
from vitrim.data import prepare as module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            (folder / split / name).mkdir(parents=True)
            for index, size in enumerate(((48, 64), (90, 30), (20, 20))):
                pixels = random.integers(0, 255, (*size, 3), np.uint8)
                kind = "png" if index == 1 else "JPEG"
                Image.fromarray(pixels).save(folder / split / name / f"{index}.{kind}")
    return folder


def facts(out: Path) -> dict[str, object]:
    return json.loads((out / "prepared.json").read_text())


def run(root: Path, *words: str) -> Path:
    out = root.parent / "out"
    main([str(root), str(out), "--short", "24", "--quiet", "--workers", "1", *words])
    return out


def test_images_keep_their_names_and_have_the_short_side(root: Path) -> None:
    out = run(root)
    made = {"made": 4, "copied": 2}
    assert facts(out)["images"] == {"train": made, "val": made}
    assert facts(out)["left_out"] == {}
    names = sorted(p.relative_to(root) for p in root.rglob("*.*"))
    assert names == sorted(p.relative_to(out) for p in out.rglob("*/*.*"))
    for name, size in (("0.JPEG", (32, 24)), ("1.png", (24, 72))):
        with Image.open(out / "train" / "n01440764" / name) as image:
            assert image.size == size
    small = Path("val") / "n01443537" / "2.JPEG"
    assert (out / small).read_bytes() == (root / small).read_bytes()
    assert len(images_in(out).train) == 6


def test_bad_images_are_left_out_and_listed(root: Path) -> None:
    broken = root / "train" / "n01440764" / "0.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    path = root / "val" / "n01443537" / "0.JPEG"
    path.rename(path.with_name("n01440764_0.JPEG"))
    left_out = facts(run(root))["left_out"]
    assert list(left_out) == ["train/n01440764/0.JPEG", "val/n01443537/n01440764_0.JPEG"]
    assert "truncated" in left_out["train/n01440764/0.JPEG"].lower()


def test_what_was_written_is_kept(root: Path) -> None:
    out = root.parent / "out"
    steps = module.prepare(root, out, module.Resizing(short=24), workers=1)
    for done, _ in steps:
        if done == 5:
            break
    steps.close()
    assert not (out / "prepared.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*/*.*")}
    assert len(kept) == 5
    run(root)
    counts = facts(out)["images"]
    assert sum(kinds.get("kept", 0) for kinds in counts.values()) == 5
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert [path.name for path in out.glob(".*")] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--short", "0"], "--short=0: expected pixels"),
        (["--quality", "101"], "--quality=101: expected"),
        (["--short", "16"], "was begun with short=24: choose another folder"),
    ],
)
def test_settings_that_cannot_be_are_refused(root: Path, words: list[str], message: str) -> None:
    run(root)
    with pytest.raises(SystemExit, match=message):
        run(root, *words)


def test_folders_that_cannot_be_are_refused(root: Path) -> None:
    for source, out, message in (
        (root, root / "out", "do not lie in each other"),
        (root / "no", root.parent / "out", "no such folder"),
        (root / "train", root.parent, "do not lie in each other"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(source), str(out), "--quiet"])
    (root.parent / "other").mkdir()
    (root.parent / "other" / "mine.txt").touch()
    with pytest.raises(SystemExit, match="is not empty, and was not begun by"):
        main([str(root), str(root.parent / "other"), "--quiet"])
