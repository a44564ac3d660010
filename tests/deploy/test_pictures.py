"""Pictures of images: their layout and their pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from vitrim.data import ImageSpec
from vitrim.deploy.pictures import image_grid

SPEC = ImageSpec(
    channels=3,
    size=(8, 8),
    mean=(0.5, 0.25, 0.0),
    std=(0.5, 0.25, 1.0),
    interpolation="bicubic",
    crop_pct=1.0,
)


def test_images_are_in_rows_of_ten_with_their_own_pixels(tmp_path: Path) -> None:
    images = torch.zeros(12, 3, 8, 8)
    images[0] = 9.0  # is cut to white
    images[1] = -9.0
    image_grid(images, SPEC, tmp_path / "synthetic.png")
    with Image.open(tmp_path / "synthetic.png") as picture:
        assert picture.size == (10 * 10 + 2, 2 * 10 + 2)  # 8 pixels, and 2 between them
        colours = [picture.getpixel((10 * column + 5, 5)) for column in range(3)]
    assert colours == [(255, 255, 255), (0, 0, 0), (128, 64, 0)]
