"""What a report says of the images of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from nets import images_in
from vitrim.data.description import describe_images
from vitrim.data.digits import Digits


def folder_of(root: Path, **changes: Any) -> Any:
    if not root.exists():
        for split, n in (("train", 4), ("val", 2)):
            for name in ("a", "b"):
                (root / split / name).mkdir(parents=True)
                for index in range(n):
                    Image.new("RGB", (8, 8)).save(root / split / name / f"{index}.png")
    return images_in(root, **changes)


def test_a_folder_of_images_is_known_by_names_and_labels(tmp_path: Path) -> None:
    first, moved = (describe_images(folder_of(tmp_path / name)) for name in ("here", "there"))
    assert first == moved
    assert (first["classes"], first["training_images"], first["validation_images"]) == (2, 8, 4)
    few = describe_images(folder_of(tmp_path / "here", samples=2))
    assert (few["training_images"], few["content"]) == (2, first["content"])
    (tmp_path / "there" / "val" / "a" / "0.png").rename(tmp_path / "there" / "val" / "b" / "9.png")
    assert describe_images(folder_of(tmp_path / "there"))["content"] != first["content"]


def test_digits_and_no_images() -> None:
    digits = Digits(batch_size=64, held_out=0.2, shift=0.0, rotation=0.0, label_smoothing=0.0)
    assert describe_images(digits)["content"] == "digits, 0.2 held out"
    assert describe_images(None) == {}
