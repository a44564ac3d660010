"""Operations on batches of pixels (B, C, H, W) in uint8, with arguments of their own per image.

They do on the images' device what Pillow does for timm's automatic augmentations. Interpolation and
blurring round differently, which changes pixels by a few levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

ARGUMENTS = 6
"""Numbers that an operation takes for each image, at most."""
_SMOOTH = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
_BLUR = 6  # pixels at either side: three standard deviations of the widest blur


def warped(images: Tensor, maps: Tensor, fill: Tensor, mode: str) -> Tensor:
    """Return each image as its affine map (B, 6) says: where an output pixel comes from.

    What lies outside is filled with the colour `fill`, (C,).
    """
    height, width = images.shape[-2:]
    a, b, c, d, e, f = maps.unbind(1)
    b, d = b * height / width, d * width / height
    c, f = a + b + 2 * c / width - 1, d + e + 2 * f / height - 1
    affine = torch.stack([torch.stack([a, b, c], 1), torch.stack([d, e, f], 1)], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    colour = fill.to(images.device)[:, None, None]
    moved = F.grid_sample(images - colour, grid, mode=mode, align_corners=False)
    return _rounded(moved + colour)


def rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Return the affine map of a rotation about the centre, counterclockwise."""
    cos, sin = math.cos(math.radians(-degrees)), math.sin(math.radians(-degrees))
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


def inverted(images: Tensor, arguments: Tensor) -> Tensor:
    """Return the negatives."""
    return 255 - images


def contrasted(images: Tensor, arguments: Tensor) -> Tensor:
    """Return images whose channels span all levels."""
    return cast(Tensor, functional.autocontrast(images))


def equalized(images: Tensor, arguments: Tensor) -> Tensor:
    """Return images in which all levels are as frequent as possible."""
    return cast(Tensor, functional.equalize(images))


def solarized(images: Tensor, arguments: Tensor) -> Tensor:
    """Invert the levels from a threshold on."""
    return torch.where(images < _each(arguments), images, 255 - images)


def solarized_by(images: Tensor, arguments: Tensor) -> Tensor:
    """Add to the levels below 128."""
    brighter = (images.short() + _each(arguments).short()).clamp(0, 255).byte()
    return torch.where(images < 128, brighter, images)


def posterized(images: Tensor, arguments: Tensor) -> Tensor:
    """Keep the highest bits of every channel; 0 give black."""
    bits = _each(arguments).clamp(0, 8)
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def bright(images: Tensor, arguments: Tensor) -> Tensor:
    """Scale the brightness."""
    return _truncated(images * _each(arguments))


def contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend with the mean grey level."""
    mean = (_grey(images).float().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blended(mean, images, arguments)


def saturated(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _blended(_grey(images), images, arguments)


def sharpened(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend with the smoothed image, which has the same border."""
    channels = images.shape[1]
    kernel = _SMOOTH.to(images.device).expand(channels, 1, 3, 3)
    smooth = images.float()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(smooth, kernel, groups=channels).round()
    return _blended(smooth, images, arguments)


def blurred(images: Tensor, arguments: Tensor) -> Tensor:
    """Blur by a Gaussian, whose standard deviation is in pixels."""
    n, channels, height, width = images.shape
    place = torch.arange(-_BLUR, _BLUR + 1, device=images.device)
    weights = (-(place**2) / (2 * arguments[:, :1].clamp_min(1e-3) ** 2)).exp()
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = images.float().reshape(1, n * channels, height, width)
    flat = F.pad(flat, (_BLUR,) * 4, mode="replicate")
    flat = F.conv2d(flat, weights[:, None, :, None], groups=n * channels)
    flat = F.conv2d(flat, weights[:, None, None, :], groups=n * channels)
    return _rounded(flat.reshape(images.shape))


OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": contrasted,
    "equalize": equalized,
    "invert": inverted,
    "solarize": solarized,
    "solarize_add": solarized_by,
    "posterize": posterized,
    "brightness": bright,
    "contrast": contrast,
    "color": saturated,
    "sharpness": sharpened,
    "gaussian_blur": blurred,
}
"""Operations by timm's name; their first argument is timm's."""
WARPS = ("bilinear", "bicubic")
"""The affine maps, by interpolation."""
CODES = (*OPERATIONS, *WARPS)
"""Names of all operations; the number of one is its place here and 1."""


def applied(images: Tensor, operations: Tensor, fill: Tensor) -> Tensor:
    """Apply layers of operations to images (B, C, H, W) in uint8, which may be changed.

    Args:
        images: on any device.
        operations: number and arguments, (B, layers, 1 + ARGUMENTS), on the CPU; 0: none.
        fill: colour of what lies outside of an image, (C,).
    """
    for layer in operations.unbind(1):
        numbers = layer[:, 0].int()
        for number in torch.unique(numbers).tolist():
            if not number:
                continue
            index = (numbers == number).nonzero().flatten()
            arguments, index = layer[index, 1:].to(images.device), index.to(images.device)
            name = CODES[number - 1]
            some = images[index]
            images[index] = (
                warped(some, arguments, fill, name)
                if name in WARPS
                else OPERATIONS[name](some, arguments)
            )
    return images


def _each(arguments: Tensor) -> Tensor:
    return arguments[:, :1, None, None]


def _grey(images: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W), in whole levels as Pillow's."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def _blended(degenerate: Tensor, images: Tensor, arguments: Tensor) -> Tensor:
    """Return a mixture, or an extrapolation from `degenerate`."""
    factor = _each(arguments)
    return _truncated(degenerate * (1 - factor) + images * factor)


def _rounded(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).byte()


def _truncated(images: Tensor) -> Tensor:
    """Return whole levels, as Pillow blends."""
    return images.clamp(0, 255).byte()
