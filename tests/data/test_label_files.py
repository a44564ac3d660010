"""Validation images in one folder, labelled by a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from nets import images_in
from vitrim.data.class_names import imagenet_wnids
from vitrim.data.image_files import ImageFiles
from vitrim.errors import ConfigError


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes to train on, and three images to evaluate on in one folder."""
    for name in ("ant", "cat", "dog"):
        image(tmp_path / "train" / name / "0.png")
    for number in (1, 2, 3):
        image(tmp_path / "val" / f"val_{number}.png")
    return tmp_path


def opened(root: Path, text: str, **changes: object) -> ImageFiles:
    (root / "labels.txt").write_text(text)
    return images_in(root, val_labels="labels.txt", **changes)  # relative to data.root


def labels(images: ImageFiles) -> dict[str, str]:
    return {
        Path(path).stem: images.classes[label]
        for path, label in zip(images.val.names, images.val.labels, strict=True)
    }


EXPECTED = {"val_1": "dog", "val_2": "ant", "val_3": "dog"}


@pytest.mark.parametrize(
    "text",
    [
        "file,label\nval_3.png,dog\nval_1.png,dog\nval_2.png,ant\n",
        "val_1.png\tdog\t0\t0\nval_2.png\tant\t0\t0\nval_3.png\tdog\t0\t0\n",
        "val_1.png 2\nval_2.png 0\nval_3.png 2\n",
        "\ufeffval_1;dog\nval_2;ant\nval_3;dog\nval_4;cat\n",
        "dog\nant\ndog\n",
        "3\n1\n3\n",
        "2\n0\n2\n",
    ],
)
def test_labels_are_read(root: Path, text: str) -> None:
    assert labels(opened(root, text)) == EXPECTED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("val_1.png,dog\nval_2.png,ant\n", ["no label for 1 of the 3", "val_3.png"]),
        ("val_1.png,dog\nval_1.png,ant\n", ["two labels for val_1.png: dog and ant"]),
        ("val_1.png,dgo\nval_2.png,ant\nval_3.png,ant\n", ["named dgo", "ant, cat, dog"]),
        ("val_1.png,3\nval_2.png,1\nval_3.png,1\n", ["the number 3 is no index of the 3"]),
        ("dog\nant\n", ["2 lines for 3 images", "FILE,LABEL"]),
        ("1\n2\n2\n", ["numbers from 1 to 2 do not say", "FILE,CLASS"]),
        ("", ["0 lines for 3 images"]),
    ],
)
def test_labels_that_cannot_be_right_are_refused(root: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(root, text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_flat_folder_says_what_to_do(root: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"3 images without class folders \(val_1\.png.*val_labels"
    ):
        images_in(root)
    with pytest.raises(ConfigError, match=r"data\.val_labels=nothing: expected a text file"):
        images_in(root, val_labels="nothing")
    image(root / "flat" / "0.png")
    with pytest.raises(ConfigError, match="1 images without class folders"):
        images_in(root, train="flat")


def test_a_list_of_classes_leaves_the_others_out(root: Path) -> None:
    images = opened(root, "dog\nant\ncat\n", classes=["ant", "dog"])
    assert labels(images) == {"val_1": "dog", "val_2": "ant"}


def test_images_in_a_further_folder_are_found(root: Path) -> None:
    (root / "val").rename(root / "images")
    (root / "val").mkdir()
    (root / "images").rename(root / "val" / "images")
    assert labels(opened(root, "dog\nant\ndog\n")) == EXPECTED


def test_an_order_of_names_that_is_not_clear_is_refused(root: Path) -> None:
    image(root / "val" / "val_10.png")
    with pytest.raises(ConfigError, match=r"val_1\.png, val_10\.png.* is ambiguous"):
        opened(root, "dog\nant\ndog\ncat\n")


def test_ilsvrcs_numbers_have_the_order_of_their_kit(tmp_path: Path) -> None:
    wnids = imagenet_wnids()
    for number in range(3):
        image(tmp_path / "val" / f"ILSVRC2012_val_{number:08}.png")
    with pytest.raises(ConfigError, match=r"numbers from 1 to 1000 do not say.*meta\.mat"):
        opened(tmp_path, "1\n1000\n2\n")
    rows = [(number, wnid) for number, wnid in enumerate(reversed(wnids), start=1)]
    kind = [("ILSVRC2012_ID", np.int64), ("WNID", object)]
    savemat(tmp_path / "meta.mat", {"synsets": np.array(rows, dtype=kind)})
    images = opened(tmp_path, "1\n1000\n2\n")
    assert images.n_classes == 1000
    assert [*images.val.labels] == [0, 998, 999]


def test_numbers_beside_names_are_imagenets_labels(tmp_path: Path) -> None:
    image(tmp_path / "train" / "n01440764" / "0.png")
    for number in range(2):
        image(tmp_path / "val" / f"{number}.png")
    images = opened(tmp_path, "0.png 999\n1.png 65\n")
    assert [*images.val.labels] == [65, 999]
