"""Names of classes: their order, how YAML types them, and the outputs of a network they have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from nets import images_in
from vitrim.data.class_names import imagenet_wnids, label_index
from vitrim.data.image_files import ImageFiles
from vitrim.data.outputs import evaluated, for_network
from vitrim.errors import ConfigError

WNIDS = imagenet_wnids()
KNOWN = ("n01440764", "n01484850", "n15075141")
"""The first, the third and the last class of ImageNet-1k."""


def labels_of(folders: list[str], classes: Any = None) -> dict[str, int]:
    return label_index(folders, classes, 0)[0]


def test_numbers_from_0_are_ordered_as_numbers() -> None:
    names = [str(number) for number in range(1000)]
    assert labels_of(sorted(names)) == {name: int(name) for name in names}
    assert [*labels_of(["1", "10", "9"])] == ["1", "10", "9"]  # as torchvision orders them
    assert [*labels_of(["00", "01", "02"])] == ["00", "01", "02"]
    twelve = [str(number) for number in range(12)]
    assert [*labels_of(twelve, ["10", "9"])] == ["9", "10"]


@pytest.mark.parametrize(
    ("folders", "typed", "expected"),
    [
        (["0", "1", "2"], "[0, 1, 2]", ["0", "1", "2"]),
        (["001", "002", "010"], "[001, 002, 010]", ["001", "002", "010"]),
        (["true", "false"], "[true, false]", ["false", "true"]),
        (["yes", "no"], "[yes, no]", ["no", "yes"]),
        (["0", "cat"], "[0, cat]", ["0", "cat"]),
        (["null", "cat"], "[null, cat]", ["cat", "null"]),
        (["1.5", "1e3"], "[1.5, 1e3]", ["1.5", "1e3"]),
    ],
)
def test_names_that_yaml_types_are_found(
    folders: list[str], typed: str, expected: list[str]
) -> None:
    classes = OmegaConf.to_container(OmegaConf.create(f"classes: {typed}").classes)
    assert [*labels_of(folders, classes)] == expected


@pytest.mark.parametrize(
    ("folders", "classes", "words"),
    [
        (["a", "b"], [0], ["no folder for [0]", "a, b", "without quotes"]),
        (["8", "010"], [8], ["8 could be any of the folders 8, 010", "in quotes"]),
        (["true", "yes"], [True], ["True could be any of the folders true, yes"]),
        (["a", "b"], ["a", "a"], ["listed more than once: a"]),
        (["a", "b"], "a", ["data.classes=a: expected null (all), a list of names", "a, b"]),
        (["a", "b"], True, ["data.classes=True: expected null"]),
        (["a", "b"], 3, ["a number from 1 to 2"]),
        (["Cat", "cat"], None, ["'Cat' and 'cat' differ in capital letters"]),
        (["caf\u00e9", "cafe\u0301"], 2, ["differ in capital letters"]),
    ],
)
def test_names_that_are_not_clear_are_refused(
    folders: list[str], classes: Any, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        label_index(folders, classes, 0)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_names_that_look_alike_can_be_listed() -> None:
    assert [*labels_of(["Cat", "cat", "dog"], ["cat", "Cat"])] == ["Cat", "cat"]


def made(root: Path, *classes: str, **splits: tuple[str, ...]) -> ImageFiles:
    """Open a set with one image per class, in both splits where no split has classes of its own."""
    for split, names in (splits or {"train": classes, "val": classes}).items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / split / name / "0.png")
    return images_in(root, val="val" if (root / "val").is_dir() else [*splits][-1])


SPEC = SimpleNamespace(
    channels=3, size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
)


def seen(images: ImageFiles) -> list[int]:
    """Return the labels of the validation images as a network gets them."""
    module = images.module(SPEC)
    return [int(label) for _, labels in module.val_dataloader() for label in labels]


def fitted(images: ImageFiles, n: int, *known: str, loaded: bool = True) -> ImageFiles:
    owner = "the network"
    return for_network(images, n, known=known, loaded=loaded, owner=owner)  # type: ignore[return-value]


def test_some_wnids_have_their_ranks_or_imagenets_labels(tmp_path: Path) -> None:
    images = made(tmp_path, *KNOWN)
    assert seen(fitted(images, 1000)) == [0, 2, 999]
    for loaded in (True, False):
        three = fitted(images, 3, loaded=loaded)
        assert (three.n_classes, three.classes) == (3, KNOWN)
        assert seen(three) == [0, 1, 2]
    listed = images_in(tmp_path, classes=[KNOWN[2], KNOWN[1]])
    assert seen(fitted(listed, 1000)) == [2, 999]
    assert seen(fitted(listed, 2)) == [0, 1]


def test_numbers_are_outputs_where_some_are_missing(tmp_path: Path) -> None:
    images = made(tmp_path, "0", "2", "10")
    assert seen(fitted(images, 1000)) == [0, 10, 2]
    assert seen(fitted(images, 1000, *WNIDS)) == [0, 10, 2]
    assert fitted(images, 1000, loaded=False).n_classes == 3  # training on them is refused
    wnids = made(tmp_path / "wnids", KNOWN[2])
    assert seen(fitted(wnids, 1000, *map(str, range(1000)))) == [999]


def test_known_names_decide(tmp_path: Path) -> None:
    images = made(tmp_path, train=("ant", "cat", "dog"), val=("cat", "dog"))
    assert seen(fitted(images, 3)) == [1, 2]
    with pytest.raises(ConfigError, match="the network does not know: ant; it knows dog, elk, cat"):
        fitted(images, 3, "dog", "elk", "cat")
    alone = fitted(evaluated(images), 3, "dog", "elk", "cat")  # type: ignore[arg-type]
    assert seen(alone) == [2, 0]
    assert alone.classes == ("dog", "elk", "cat")


def test_numbers_in_two_orders_are_refused_for_a_classifier_without_names(tmp_path: Path) -> None:
    images = made(tmp_path, *map(str, range(1, 11)))
    with pytest.raises(ConfigError, match=r"1, 10, 2.* may be ordered as texts or as numbers"):
        fitted(images, 10)
    assert fitted(images, 10, loaded=False) is images


def test_calibration_and_training_have_the_labels_of_outputs(tmp_path: Path) -> None:
    module = fitted(made(tmp_path, "cat", "dog"), 3, "dog", "elk", "cat").module(SPEC)
    (batch,) = module.calibration_dataloader(10, 0)
    assert batch[1].tolist() == [2, 0]
    assert sorted(int(module.train_set[index][1]) for index in range(2)) == [0, 2]


def test_draws_do_not_depend_on_the_outputs(tmp_path: Path) -> None:
    made(tmp_path, *KNOWN)
    images = images_in(tmp_path, samples=2)
    assert (
        fitted(images, 3).sample_names == fitted(images, 1000).sample_names == images.sample_names
    )


def test_splits_may_have_names_that_yaml_types(tmp_path: Path) -> None:
    made(tmp_path, **{"2012": ("a", "b"), "010": ("a", "b")})
    images = images_in(tmp_path, train=2012, val=8)  # what YAML 1.1 makes of 010
    assert [Path(path).parents[1].name for path in images.val.names] == ["010", "010"]
    assert len(images.train) == 2
    with pytest.raises(ConfigError, match=r"data\.val=2013: .* there are 010, 2012; write it in"):
        images_in(tmp_path, train=2012, val=2013)
