"""Views of images that recovery trains on: crops, flips and mixtures, drawn again in every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrim.errors import is_positive, require

Mix = Literal["mixup", "cutmix", "patchmix"]
"""Mixtures of two images: a weighted mean, a box, or cells of a grid."""
_CELLS = 7  # a side; in images of 224 pixels a cell has 2 x 2 patches of 16
_ASPECT = math.log(4 / 3)  # of crops: width to height between 3/4 and 4/3


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """What is drawn for the images of a batch.

    Args:
        crop: smallest share of an image that is cropped, and resized to the whole; 1: no crops.
        flip: whether half of the images are mirrored.
        mix: mixtures, one of which is drawn for each batch; its shares are drawn for each image.
            mixup (arXiv 1710.09412): a weighted mean; cutmix (arXiv 1905.04899): a box of another
            image; patchmix: cells of a grid from another image. Empty: images are not mixed.
    """

    crop: float
    flip: bool
    mix: Sequence[Mix]

    def __post_init__(self) -> None:
        allowed = get_args(Mix)
        listed = isinstance(self.mix, list | tuple)
        require(
            "method.tuning.recovery.views",
            self,
            ("crop", is_positive(self.crop) and self.crop <= 1, "a number above 0 and at most 1"),
            ("flip", isinstance(self.flip, bool), "true or false"),
            (
                "mix",
                listed and all(mix in allowed for mix in self.mix),
                f"a list of {', '.join(allowed)}",
            ),
        )

    def of(self, images: Tensor) -> Tensor:
        """Return a view of images (B, C, H, W), of the same shape; plain ones without settings."""
        if self.crop < 1 or self.flip:
            images = _cropped(images, self.crop, flip=self.flip)
        if self.mix:
            chosen = self.mix[int(torch.randint(len(self.mix), ()))]
            images = _mixed(images, chosen)
        return images


def _cropped(images: Tensor, smallest: float, *, flip: bool) -> Tensor:
    """Return a random part of each image, resized to the whole, mirrored half of the time."""
    n = len(images)
    area, aspect, x, y, side = torch.rand(5, n, device=images.device)
    area = smallest + (1 - smallest) * area
    ratio = (_ASPECT * (2 * aspect - 1) * (smallest < 1)).exp()
    width, height = ((area * by).sqrt().clamp_max(1.0) for by in (ratio, 1 / ratio))
    sign = torch.where(side < 0.5, -1.0, 1.0) if flip else torch.ones_like(side)
    zero = torch.zeros_like(area)
    affine = torch.stack(
        [
            torch.stack([sign * width, zero, (2 * x - 1) * (1 - width)], dim=1),
            torch.stack([zero, height, (2 * y - 1) * (1 - height)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    parts = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return parts.to(images.dtype)


def _mixed(images: Tensor, mix: Mix) -> Tensor:
    """Return each image mixed with another one of the batch, in shares that are drawn."""
    n, device = len(images), images.device
    others = images[torch.randperm(n, device=device)]
    share = torch.rand(n, 1, 1, 1, device=device)
    match mix:
        case "mixup":
            return torch.lerp(images, others, share.to(images.dtype))
        case "cutmix":
            taken = _boxes(images, share)
        case "patchmix":
            cells = torch.rand(n, 1, _CELLS, _CELLS, device=device) < share
            taken = F.interpolate(cells.float(), size=images.shape[-2:]) > 0
    return torch.where(taken, others, images)


def _boxes(images: Tensor, share: Tensor) -> Tensor:
    """Return masks (B, 1, H, W) of boxes that have a share (B, 1, 1, 1) of the image, at most."""
    n, _, height, width = images.shape
    row = (torch.arange(height, device=images.device) + 0.5)[:, None] / height
    column = (torch.arange(width, device=images.device) + 0.5) / width
    centre = torch.rand(2, n, 1, 1, 1, device=images.device)
    half = share.sqrt() / 2
    return ((row - centre[0]).abs() < half) & ((column - centre[1]).abs() < half)
