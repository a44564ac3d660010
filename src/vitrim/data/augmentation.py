"""Augmentation of tensors: drawn for each image where it is decoded, carried out on the device.

timm's own transforms draw, in the same order and from the same generators as for Pillow's images.
Crops and flips are made of the decoded pixels (uint8). Of everything else only the arguments are
kept: `Augmentation.finish` applies them to a whole batch on its device, and normalises it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomHorizontalFlip
from torchvision.transforms.v2 import functional

from vitrim.data.pixels import ARGUMENTS, CODES, applied, rotation
from vitrim.errors import ConfigError

_Drawn = list[tuple[float, ...]]
_AFFINE = {
    "shear_x": lambda factor, size: (1, factor, 0, 0, 1, 0),
    "shear_y": lambda factor, size: (1, 0, 0, factor, 1, 0),
    "translate_x_rel": lambda part, size: (1, 0, part * size[1], 0, 1, 0),
    "translate_y_rel": lambda part, size: (1, 0, 0, 0, 1, part * size[0]),
    "translate_x_abs": lambda pixels, size: (1, 0, pixels, 0, 1, 0),
    "translate_y_abs": lambda pixels, size: (1, 0, 0, 0, 1, pixels),
    "rotate": lambda degrees, size: rotation(degrees, *size),
}
"""timm's names of affine maps: the map (6 numbers) of an image of size (H, W)."""
_JITTERS = ("brightness", "contrast", "color")
"""What torchvision's ColorJitter changes, in the order of its numbers."""


class Drawn(TypedDict):
    """An image, or a batch of them, and what was drawn for it.

    `pixels` (C, H, W) in uint8; `operations` (layers, 1 + ARGUMENTS); `boxes` (n, 4) to erase, with
    top, left, height and width, empty ones of height 0; `seed` of the pixels in them.
    """

    pixels: Tensor
    operations: Tensor
    boxes: Tensor
    seed: int | Tensor


class Augmentation:
    """timm's training transform of the same `options`, on tensors.

    Raises:
        ConfigError: tensors have no such augmentation.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        _check(options)
        crop, colours, last = create_transform(is_training=True, separate=True, **options)
        self.size: tuple[int, int] = tuple(options["input_size"])[-2:]
        self._crop: RandomResizedCropAndInterpolation = crop.transforms[0]
        self._flips = crop.transforms[1:]
        self._colours = [_recording(step, self.size) for step in colours.transforms]
        self._layers = sum(map(_layers, colours.transforms))
        erasing = [step for step in last.transforms if isinstance(step, RandomErasing)]
        self._erasing: RandomErasing | None = next(iter(erasing), None)
        mean, std = (torch.tensor(options[key])[:, None, None] for key in ("mean", "std"))
        self.mean, self.std = mean, std
        self.fill = (255 * mean).round().clamp(max=255).flatten()

    def __call__(self, image: Image.Image | Tensor) -> Drawn:
        """Crop and flip an image; draw what is done to it later."""
        pixels = image if isinstance(image, Tensor) else functional.pil_to_tensor(image)
        pixels = self._cropped(pixels)
        for flip in self._flips:
            if torch.rand(1) < flip.p:
                pixels = pixels.flip(-1 if isinstance(flip, RandomHorizontalFlip) else -2)
        operations: _Drawn = []
        for draw in self._colours:
            draw(operations)
        table = np.zeros((self._layers, 1 + ARGUMENTS), np.float32)
        for row, numbers in zip(table, operations, strict=False):
            row[: len(numbers)] = numbers
        return Drawn(
            pixels=pixels.contiguous(),
            operations=torch.from_numpy(table),
            boxes=_boxes(self._erasing, self.size),
            seed=torch.initial_seed() % 2**62,
        )

    def _cropped(self, pixels: Tensor) -> Tensor:
        """Return the part of an image that is drawn, resized."""
        top, left, height, width = self._crop.get_params(pixels, self._crop.scale, self._crop.ratio)
        mode = self._crop.interpolation
        if isinstance(mode, list | tuple):
            mode = random.choice(mode)
        part = pixels[None, :, top : top + height, left : left + width]
        return F.interpolate(part, self.size, mode=mode.value, antialias=True)[0]

    def finish(self, drawn: Drawn) -> Tensor:
        """Return the images of a batch (B, C, H, W), augmented and normalised, on their device."""
        pixels, seeds = drawn["pixels"], drawn["seed"]
        images = self.normalised(applied(pixels, drawn["operations"], self.fill))
        if self._erasing is not None:
            assert isinstance(seeds, Tensor)
            _erase(images, drawn["boxes"].tolist(), seeds.tolist(), self._erasing.mode)
        return images

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return pixels in uint8 as numbers of mean 0 and deviation 1, over the training set."""
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return pixels.float().div(255).sub(mean).div(std)


def _check(options: Mapping[str, Any]) -> None:
    """Refuse what timm would do and tensors cannot."""
    wrong = [
        key
        for key, allowed in _ONLY.items()
        if key in options and options[key] not in allowed and options[key] is not None
    ]
    if str(options.get("auto_augment")).startswith("augmix"):
        wrong.append("auto_augment")
    jitter = options.get("color_jitter")
    if isinstance(jitter, list | tuple) and len(jitter) > 3 and jitter[3]:
        wrong.append("color_jitter")
    if wrong:
        named = ", ".join(f"data.augmentation.{key}={options[key]}" for key in wrong)
        raise ConfigError(
            f"{named}: augmentation of tensors has no such thing; "
            "data.augmentation.backend=pil augments by timm itself"
        )


_ONLY: Mapping[str, tuple[object, ...]] = {
    "no_aug": (False,),
    "train_crop_mode": ("rrc",),
    "color_jitter_prob": (),
    "grayscale_prob": (0,),
    "gaussian_blur_prob": (0,),
    "re_num_splits": (0,),
    "naflex": (False,),
    "patchify": (False,),
    "interpolation": ("bilinear", "bicubic", "random"),
}
"""Options of timm's transform, with the values that tensors can do."""


def _layers(step: object) -> int:
    """Return how many operations a step applies to an image, at most."""
    match step:
        case RandAugment():
            return int(step.num_layers)
        case AutoAugment():
            return max(map(len, step.policy))
    return len(_JITTERS)


def _recording(step: Any, size: tuple[int, int]) -> Callable[[_Drawn], object]:
    """Return what draws as `step` does, and adds its operations to a list."""
    match step:
        case RandAugment():
            operations = step.ops
        case AutoAugment():
            operations = [operation for policy in step.policy for operation in policy]
        case ColorJitter():
            return partial(_jitter, step)
        case _:
            raise TypeError(f"{type(step).__name__}: not an augmentation of timm's that is known")
    for operation in operations:
        _record(operation, size)
    return cast(Callable[[_Drawn], object], step)


def _record(operation: AugmentOp, size: tuple[int, int]) -> None:
    """Let one of timm's operations add itself to a list, in place of an image."""
    name = operation.aug_fn.__name__.lstrip("_")

    def record(drawn: _Drawn, *arguments: float, **settings: Any) -> _Drawn:
        if name in _AFFINE:
            mode = timm_augment._interpolation(settings)
            code = "bicubic" if mode == Image.Resampling.BICUBIC else "bilinear"
            drawn.append((_number(code), *_AFFINE[name](arguments[0], size)))  # type: ignore[no-untyped-call]
        elif name == "gaussian_blur_rand":
            drawn.append((_number("gaussian_blur"), random.uniform(0.1, 2.0 * arguments[0])))
        elif name == "desaturate":
            drawn.append((_number("color"), min(1.0, max(0.0, 1.0 - arguments[0]))))
        else:
            drawn.append((_number(name), *arguments))
        return drawn

    operation.aug_fn = record


def _number(name: str) -> int:
    return 1 + CODES.index(name)


def _jitter(step: ColorJitter, drawn: _Drawn) -> None:
    """Draw brightness, contrast and saturation, and their order."""
    order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
    for place in order.tolist():
        if place < len(_JITTERS) and factors[place] is not None:
            drawn.append((_number(_JITTERS[place]), factors[place]))


def _boxes(erasing: RandomErasing | None, size: tuple[int, int]) -> Tensor:
    """Return the boxes to erase of an image, (n, 4)."""
    if erasing is None:
        return torch.zeros(0, 4, dtype=torch.int32)
    least, most = erasing.min_count, erasing.max_count
    boxes = np.zeros((most, 4), np.int32)
    if random.random() <= erasing.probability:
        count = least if least == most else random.randint(least, most)
        for row in boxes[:count]:
            row[:] = _box(erasing, size, count)
    return torch.from_numpy(boxes)


def _box(erasing: RandomErasing, size: tuple[int, int], count: int) -> Sequence[int]:
    """Return top, left, height and width of one box that fits; zeros if none did."""
    for _ in range(10):
        area = random.uniform(erasing.min_area, erasing.max_area) * size[0] * size[1] / count
        ratio = math.exp(random.uniform(*erasing.log_aspect_ratio))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < size[0] and width < size[1]:
            top = random.randint(0, size[0] - height)
            return top, random.randint(0, size[1] - width), height, width
    return 0, 0, 0, 0


def _erase(
    images: Tensor, boxes: Sequence[Sequence[Sequence[int]]], seeds: Sequence[int], mode: str
) -> None:
    """Replace boxes of images by zeros ("const"), a colour ("rand") or pixels that are drawn."""
    generator = torch.Generator(images.device)
    for image, own, seed in zip(images, boxes, seeds, strict=True):
        if not any(height for *_, height, _ in own):
            continue
        generator.manual_seed(seed)
        for top, left, height, width in own:
            shape = (len(image), *((height, width) if mode == "pixel" else (1, 1)))
            part = image[:, top : top + height, left : left + width]
            if mode in ("pixel", "rand"):
                noise = torch.empty(shape, device=image.device).normal_(generator=generator)
                part.copy_(noise.expand_as(part))
            else:
                part.zero_()
