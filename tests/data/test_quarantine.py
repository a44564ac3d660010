"""Images of every bad kind, and odd ones that are not bad, from tiny generated files."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from command import EVERY_IMAGE, QUICK, Command
from nets import images_in
from vitrim.data.bad_images import reasons_by_split, recorded
from vitrim.data.defects import BadImages
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.image_files import ImageFiles
from vitrim.data.quarantine import TolerantDataset, max_bad_images
from vitrim.errors import ConfigError

SIZE = 24


def pixels(seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def truncated(path: Path) -> None:
    pixels().save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-200])


def bomb(path: Path) -> None:
    """Write a PNG of a few bytes that claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body)


def broken_png(path: Path) -> None:
    pixels().save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[40] ^= 0xFF
    path.write_bytes(content)


BAD: dict[str, Callable[[Path], object]] = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image"),
    "bomb": bomb,
    "broken": broken_png,
    "dangling": lambda path: path.symlink_to("nowhere.jpg"),
}
ODD: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "cmyk": ("JPEG", lambda image: image.convert("CMYK")),
    "grey": ("JPEG", lambda image: image.convert("L")),
    "palette": ("PNG", lambda image: image.quantize(16)),
    "alpha": ("PNG", lambda image: image.convert("RGBA")),
    "grey and alpha": ("PNG", lambda image: image.convert("LA")),
    "bits": ("PNG", lambda image: image.convert("1")),
    "palette of alphas": ("PNG", lambda image: _with_alphas(image.quantize(16))),
    "rotated": ("JPEG", lambda image: image),  # with an orientation
}


def _with_alphas(image: Image.Image) -> Image.Image:
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of four good images, in both splits."""
    for split in ("train", "val"):
        for index, name in enumerate("ab"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels(4 * index + number).save(folder / f"{number}.jpg")
    return tmp_path / "images"


def opened(root: Path, limit: float = 0.5, evaluation: str = "fail", **changes: Any) -> ImageFiles:
    return images_in(root, bad_images={"limit": limit, "evaluation": evaluation}, **changes)


def spoil(path: Path, kind: str) -> Path:
    path.unlink()
    BAD[kind](path)
    return path


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_training_image_is_replaced_and_no_other_moves(root: Path, kind: str) -> None:
    before = [image for image, _ in opened(root).train]
    bad = spoil(root / "train" / "a" / "3.jpg", kind)
    images = opened(root)
    after = [images.train[index] for index in range(8)]
    assert [label for _, label in after] == [0] * 4 + [1] * 4
    expected = [*before[:3], before[0], *before[4:]]  # after the last of a class comes its first
    assert all(same(image, old) for (image, _), old in zip(after, expected, strict=True))
    assert list(reasons_by_split(images)["training"]) == [str(bad)]


def test_the_stand_in_does_not_depend_on_what_was_asked_for_before(root: Path) -> None:
    for number in (1, 2):
        spoil(root / "train" / "a" / f"{number}.jpg", "text")
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 1]):
        train = opened(root).train
        items = {index: train[index][0] for index in order}
        assert same(items[1], train[3][0])
        assert same(items[2], train[3][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_find_is_known_here(root: Path, workers: int) -> None:
    bad = [spoil(root / "train" / name / "2.jpg", "truncated") for name in "ab"]
    images = opened(root)
    train = images.train
    train.transform = lambda image: torch.tensor(image.getpixel((0, 0)))
    batches = list(DataLoader(train, batch_size=2, num_workers=workers))
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack([x for x, _ in train]))
    reasons = reasons_by_split(images)["training"]
    assert list(reasons) == [str(path) for path in bad]
    assert all("OSError: " in reason for reason in reasons.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_the_limit_end_the_run_with_the_first_files(root: Path, workers: int) -> None:
    bad = [spoil(root / "train" / "b" / f"{number}.jpg", "empty") for number in (0, 1)]
    train = opened(root, limit=1).train
    train.transform = lambda image: torch.zeros(1)
    with pytest.raises(BadImages, match=r"bad_images\.limit: 2 of the 8") as error:
        list(DataLoader(train, batch_size=2, num_workers=workers))
    text = str(error.value)
    assert text.startswith("data.bad_images.limit")
    assert all(f"{path}: UnidentifiedImageError" in text for path in bad)
    assert "Traceback" not in text


def test_a_class_without_a_usable_image_is_named(root: Path) -> None:
    for number in range(4):
        spoil(root / "train" / "b" / f"{number}.jpg", "text")
    with pytest.raises(BadImages, match=r"b/1\.jpg: no training image of its class"):
        opened(root, limit=1.0).train[5]


@pytest.mark.parametrize("limit", [-1, -0.1, 1.1, "1", None, True, float("nan")])
def test_limits_that_are_none_are_refused(root: Path, limit: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.bad_images\.limit"):
        opened(root, limit=limit)


def test_a_share_is_rounded_down() -> None:
    assert [max_bad_images(limit, 199) for limit in (0.01, 1.0, 1, 0)] == [1, 199, 1, 0]


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_no_bad_ones(root: Path, name: str) -> None:
    kind, change = ODD[name]
    path = root / "train" / "a" / "0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    change(pixels()).save(path, kind, **({"exif": exif} if name == "rotated" else {}))
    images = opened(root, limit=0)
    image, _ = images.train[0]
    assert image.mode == "RGB"
    assert same(image, Image.open(path).convert("RGBA").convert("RGB"))
    assert reasons_by_split(images) == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_fails_and_names_every_bad_image(root: Path, workers: int) -> None:
    kinds = ("truncated", "bomb", "empty")
    bad = [spoil(root / "val" / "b" / f"{index}.jpg", kind) for index, kind in enumerate(kinds)]
    val = opened(root).val
    val.transform = lambda image: torch.zeros(1)
    with pytest.raises(BadImages, match="3 of the 8 images") as error:
        list(DataLoader(val, batch_size=8, num_workers=workers))
    assert all(str(path) in str(error.value) for path in bad)
    assert "DecompressionBombError" in str(error.value)


def test_evaluation_can_leave_bad_images_out(root: Path) -> None:
    bad = spoil(root / "val" / "a" / "1.jpg", "text")
    images = opened(root, evaluation="skip")
    assert [label for _, label in images.val] == [0] * 3 + [1] * 4
    assert list(reasons_by_split(images)["evaluation"]) == [str(bad)]
    with pytest.raises(ConfigError, match=r"data\.bad_images\.evaluation=drop"):
        opened(root, evaluation="drop")


def test_evaluation_on_nothing_is_refused(root: Path) -> None:
    for path in (root / "val").rglob("*.jpg"):
        spoil(path, "text")
    with pytest.raises(BadImages, match="8 of the 8"):
        len(opened(root, evaluation="skip").val)


def test_images_named_after_another_class_are_bad(root: Path) -> None:
    for split in ("train", "val"):
        for old, new in (("a", "n01440764"), ("b", "n02102040")):
            (root / split / old).rename(root / split / new)
    (root / "train" / "n01440764" / "0.jpg").rename(
        root / "train" / "n01440764" / "n01440764_0.jpg"
    )
    right = opened(root)
    assert reasons_by_split(right) == {}
    path = root / "train" / "n01440764" / "n02102040_7.jpg"
    (root / "train" / "n01440764" / "1.jpg").rename(path)
    images = opened(root)
    assert reasons_by_split(images) == {"training": {str(path): "named after another class"}}
    assert len(images.train) == 8
    with pytest.raises(BadImages, match="1 of the 8"):
        opened(root, limit=0)
    (root / "val" / "n01440764" / "1.jpg").rename(root / "val" / "n01440764" / "n02102040_7.jpg")
    with pytest.raises(BadImages, match=r"images to evaluate on.*\n.*n02102040_7"):
        opened(root)
    assert len(opened(root, evaluation="skip").val) == 7


def test_a_few_images_take_their_stand_ins_from_the_whole_set(root: Path) -> None:
    images = opened(root, samples=2)
    assert isinstance(images.train, FewShotSubset)
    spoil(root / images.sample_names[0], "text")
    image, label = images.train[0]
    assert label == 0
    assert image.mode == "RGB"
    assert list(reasons_by_split(images)["training"]) == [str(root / images.sample_names[0])]


def test_a_machine_that_cannot_read_is_no_fault_of_the_image(root: Path) -> None:
    def fail(path: str) -> Image.Image:
        raise OSError(5, "Input/output error")

    folder = ImageFolder(str(root / "train"), loader=fail)
    names = [path for path, _ in folder.samples]
    train = TolerantDataset(folder, labels=folder.targets, names=names, limit=1.0)
    with pytest.raises(BadImages, match=r"a/0\.jpg: could not be read \(machine error"):
        train[0]


def test_the_list_grows_and_outlives_errors(root: Path, tmp_path: Path) -> None:
    paths = [spoil(root / "train" / name / "0.jpg", "text") for name in "ab"]
    for index in (0, 4):
        images = opened(root)
        images.train.transform = lambda image: 1 // 0
        with pytest.raises(ZeroDivisionError), recorded(images, tmp_path):
            images.train[index]
    listed = json.loads((tmp_path / "quarantine.json").read_text())
    assert list(listed) == ["training"]
    assert list(listed["training"]) == [str(path) for path in paths]
    with recorded(None, tmp_path / "other"):
        pass
    assert not (tmp_path / "other").exists()


def test_a_run_lists_and_counts_what_it_met(command: Command, root: Path) -> None:
    bad = spoil(root / "train" / "a" / "1.jpg", "truncated")
    words = ("model.num_classes=2", "model.image_size=16", "model.args.in_chans=3")
    folders = ("data=imagefolder", f"data.root={root}", "data.batch_size=4", "data.workers=0")
    quick = (*QUICK, EVERY_IMAGE, "strength=0", "data.bad_images.limit=1")
    done = command(*quick, *words, *folders)
    assert done.code == 0, done.message
    assert json.loads(done.report.read_text())["bad_images"] == {"training": 1}
    listed = json.loads((done.report.parent / "quarantine.json").read_text())
    assert list(listed["training"]) == [str(bad)]
    spoil(root / "val" / "b" / "2.jpg", "empty")
    done = command(*quick, *words, *folders, "seed=1")
    assert done.code == 1
    assert "1 of the 8 images to evaluate on" in done.message


def test_a_folder_that_is_no_class_is_named_among_wnids(root: Path) -> None:
    (root / "train" / "a").rename(root / "train" / "n01440764")
    with pytest.raises(
        ConfigError, match=r"after wnids, these are not: \['a', 'b'\].*data\.classes"
    ):
        opened(root)
