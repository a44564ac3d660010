"""Pictures in the run folder of the images that a network was evaluated on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from vitrim.data import ImageSpec
from vitrim.files import write

COLUMNS = 10
"""Images in a row."""


def image_grid(images: Tensor, spec: ImageSpec, path: Path) -> None:
    """Write images (n, C, H, W), normalised as `spec` says, in rows into one PNG."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1)
    write(path, lambda file: save_image(pixels, file, nrow=COLUMNS, format="png"))
