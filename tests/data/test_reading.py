"""Pixels of every kind become RGB; files and folders that are no images and no classes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nets import images_in
from vitrim.data.bad_images import reasons_by_split
from vitrim.data.reading import extensions, read_image
from vitrim.errors import ConfigError

RAMP = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
GREY = np.rint(RAMP / 257).astype(np.uint8)


def ramp(*, dtype: str = "<u2") -> Image.Image:
    return Image.fromarray(RAMP.astype(dtype))


def big_endian_tiff(path: Path) -> None:
    """Write the ramp as a TIFF of big-endian 16-bit pixels."""
    tags = [(256, 8), (257, 8), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8)]
    tags.append((279, RAMP.nbytes))
    body = RAMP.astype(">u2").tobytes()
    entries = b"".join(
        tag.to_bytes(2, "big") + b"\0\4\0\0\0\1" + value.to_bytes(4, "big") for tag, value in tags
    )
    offset = 8 + len(body)
    header = b"MM\0*" + offset.to_bytes(4, "big")
    path.write_bytes(header + body + len(tags).to_bytes(2, "big") + entries + bytes(4))


def wide_pgm(path: Path) -> None:
    path.write_bytes(b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes())


WIDE: dict[str, Callable[[Path], object]] = {
    "0.png": lambda path: ramp().save(path),
    "0.tif": lambda path: ramp().save(path),
    "0.tiff": big_endian_tiff,
    "0.pgm": wide_pgm,
}


@pytest.mark.parametrize("name", WIDE)
def test_16_bits_are_scaled_by_their_range(tmp_path: Path, name: str) -> None:
    WIDE[name](tmp_path / name)
    image = read_image(str(tmp_path / name))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 1].astype(int) - GREY).max() <= 1


def test_floats_from_0_to_1_are_scaled(tmp_path: Path) -> None:
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "0.tif")
    image = read_image(str(tmp_path / "0.tif"))
    assert np.abs(np.asarray(image)[..., 0].astype(int) - GREY).max() <= 1


def folders(root: Path, *classes: str, image: Image.Image | None = None) -> Path:
    """Write one image per class and split."""
    for split in ("train", "val"):
        for index, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            made = Image.new("RGB", (8, 8), (40 * index, 0, 0)) if image is None else image
            made.save(root / split / name / "0.png")
    return root


UNKNOWN = {
    "floats above 1": (np.full((8, 8), 200, np.float32), "floating-point pixels from 200 to 200"),
    "no numbers": (np.full((8, 8), np.nan, np.float32), "floating-point pixels from nan"),
    "32 bits": (np.full((8, 8), 70_000, np.int32), "integer pixels of 32 bits"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_pixels_of_an_unknown_range_are_bad(tmp_path: Path, kind: str) -> None:
    pixels, reason = UNKNOWN[kind]
    root = folders(tmp_path, "a", "b")
    path = root / "train" / "a" / "1.tif"
    Image.fromarray(pixels).save(path)
    images = images_in(root, bad_images={"limit": 1, "evaluation": "fail"})
    images.train[1]
    (text,) = reasons_by_split(images)["training"].values()
    assert text.startswith(f"ValueError: {reason}")


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    assert read_image(str(tmp_path / "0.gif")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("extension", [".gif", ".jfif", ".JPE", ".avif", ".jp2"])
def test_further_extensions_are_read(tmp_path: Path, extension: str) -> None:
    if extension.lower() not in extensions():
        pytest.skip(f"this Pillow reads no {extension}")
    root = folders(tmp_path, "a", "b")
    kind = {".jfif": "JPEG", ".JPE": "JPEG", ".jp2": "JPEG2000"}.get(extension)
    for split in ("train", "val"):
        (root / split / "b" / "0.png").unlink()
        Image.new("RGB", (8, 8)).save(root / split / "b" / f"0{extension}", kind)
    images = images_in(root)
    assert [label for _, label in images.val] == [0, 1]
    assert images.listing == 2  # version 0.1.0 found no image of that class


def test_a_class_of_other_files_is_refused_by_name(tmp_path: Path) -> None:
    root = folders(tmp_path, "a", "b", "c")
    (root / "train" / "b" / "0.png").rename(root / "train" / "b" / "0.heic")
    (root / "train" / "b" / "notes").write_text("")
    with pytest.raises(
        ConfigError, match=r"class b has no image.*\.heic \(1\), no extension \(1\)"
    ):
        images_in(root)
    assert images_in(root, classes=["a", "c"]).n_classes == 2


def test_a_class_without_any_file_is_refused_by_name(tmp_path: Path) -> None:
    root = folders(tmp_path, "a", "b")
    (root / "val" / "c").mkdir()
    with pytest.raises(ConfigError, match="class folders without any image: c"):
        images_in(root)


def test_folders_of_the_system_are_no_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folders(tmp_path, "a", "b")
    assert images_in(root).listing == 1
    names = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", ".hidden")
    for name in names:
        for folder in (root / "train" / name, root / "train" / "a" / name):
            folder.mkdir()
            Image.new("RGB", (8, 8)).save(folder / "0.png")
    (root / "train" / "a" / "._0.png").write_bytes(b"resource fork")
    (root / "train" / "b" / "Thumbs.db").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        images = images_in(root)
    assert images.classes == ("a", "b")
    assert len(images.train) == 2
    assert images.listing == 2
    assert all(name in caplog.text for name in (*names[:4], ".db (1)"))


def test_images_are_turned_on_demand_only(tmp_path: Path) -> None:
    root = folders(tmp_path, "a")
    image = Image.new("RGB", (16, 8))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    for split in ("train", "val"):
        image.save(root / split / "a" / "0.png", exif=exif)
    for choice, size, corner in ((False, (16, 8), (0, 0)), (True, (8, 16), (7, 0))):
        images = images_in(root, exif_orientation=choice)
        for split in (images.train, images.val):
            (seen, _) = split[0]
            assert seen.size == size
            assert seen.getpixel(corner) == (255, 255, 255)
    with pytest.raises(ConfigError, match=r"data\.exif_orientation=1: expected true or false"):
        images_in(root, exif_orientation=1)
