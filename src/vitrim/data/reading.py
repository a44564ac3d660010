"""How an image file becomes an RGB image, and which files are images.

Pillow converts grey, palette, CMYK and transparent images; the colour under transparent pixels
counts, and of an animation the first frame. It clips pixels of more than 8 bits, which are scaled
here by their range.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode

from vitrim.errors import ConfigError

_KNOWN = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What version 0.1.0 read."""
_FURTHER = (".jpe", ".jfif", ".gif", ".avif", ".pbm", ".pnm", ".apng", ".jp2")
_16_BITS = 2**16 - 1


@cache
def extensions() -> tuple[str, ...]:
    """Return the extensions of files that are read, which depend on how Pillow was built."""
    readable = Image.registered_extensions()
    return tuple(extension for extension in (*_KNOWN, *_FURTHER) if extension in readable)


def is_new(name: str) -> bool:
    """Whether version 0.1.0 did not read files of this name."""
    return not name.lower().endswith(_KNOWN)


def checked_exif(setting: object) -> bool:
    """Return the setting data.exif_orientation.

    Raises:
        ConfigError: it is neither true nor false.
    """
    if not isinstance(setting, bool):
        raise ConfigError(f"data.exif_orientation={setting}: expected true or false")
    return setting


def read_image(path: str, *, exif_orientation: bool = False) -> Image.Image:
    """Return the image in a file as RGB; `exif_orientation` turns it as its camera was held.

    Raises:
        ValueError: the image has no pixels, or pixels of an unknown range.
    """
    with Path(path).open("rb") as file:
        return decode_image(file, exif_orientation=exif_orientation)


def decode_image(file: BinaryIO, *, exif_orientation: bool = False) -> Image.Image:
    """Return the image in an open file as `read_image` does."""
    image = Image.open(file)
    image.load()
    wide = image.format in ("PNG", "PPM")  # whose mode I holds 16 bits
    turned = ImageOps.exif_transpose(image) if exif_orientation else image
    return _rgb(turned, wide=wide)


def _rgb(image: Image.Image, *, wide: bool) -> Image.Image:
    """Return an image as RGB; `wide` says that mode I has 16 bits."""
    if 0 in image.size:
        raise ValueError(f"an image of {image.size[0]} x {image.size[1]} pixels")
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and wide):
        return _scaled(np.asarray(image), _16_BITS)
    if mode == "I":
        raise ValueError("integer pixels of 32 bits: their range is unknown; save 8 or 16 bits")
    if mode == "F":
        return _scaled(_unit(np.asarray(image)), 1)
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns otherwise; the colours are the same
    return image.convert("RGB")


def _unit(pixels: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> np.ndarray:
    """Return floating-point pixels, (H, W), if they are from 0 to 1."""
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # NaN as well
        raise ValueError(
            f"floating-point pixels from {low:g} to {high:g}: expected 0 to 1; save 8 or 16 bits"
        )
    return pixels


def _scaled(pixels: np.ndarray, largest: int) -> Image.Image:
    """Return grey pixels from 0 to `largest`, (H, W), as RGB."""
    grey = np.rint(pixels.astype(np.float64) * (255 / largest)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def read_pixels(path: str, *, exif_orientation: bool = False) -> Tensor:
    """Return the image in a file as RGB, (3, H, W) in uint8.

    Grey and RGB JPEG files are decoded by torchvision, whose colours may differ by a level; all
    others as `read_image` does.

    Raises:
        ValueError: as `read_image`.
    """
    return decode_pixels(Path(path).read_bytes(), exif_orientation=exif_orientation)


def decode_pixels(content: bytes, *, exif_orientation: bool = False) -> Tensor:
    """Return the image of a file's content as `read_pixels` does."""
    if _is_plain_jpeg(content):
        try:
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            # what torchvision.io.decode_jpeg calls, which warns of torchcodec from 0.29 on
            decode = torch.ops.image.decode_jpeg
            pixels: Tensor = decode(encoded, ImageReadMode.RGB.value, exif_orientation)
            return pixels
        except (RuntimeError, AttributeError):
            pass  # Pillow says what is wrong with it
    image = decode_image(io.BytesIO(content), exif_orientation=exif_orientation)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether a file is a JPEG of 1 or 3 channels, and of a size that Pillow does not refuse."""
    place = 2
    if content[:2] != b"\xff\xd8":
        return False
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(content[place + 5 : place + 7])
            width = int.from_bytes(content[place + 7 : place + 9])
            limit = Image.MAX_IMAGE_PIXELS or height * width
            return content[place + 9] in (1, 3) and 0 < height * width <= limit
        if marker == 0xFF:  # a byte that fills
            place += 1
            continue
        place += 2 + length
    return False
