"""Images that a network dreams up, to judge other networks by when there are few real ones.

DeepInversion's image prior on DeepDream, as DC-ViT uses it (arXiv 2403.18708, eqs. 4 and 5): from
noise, pixels are optimised until the network is sure of given classes, held smooth and small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image

from vitrim.data import ImageSpec
from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.files import write

METRIC_SET = "metric_set"
"""Under which evidence has the images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dream:
    """How images are made; the defaults of conf/method/dcvit.yaml are the paper's code's.

    `images` of as many distinct classes, `iterations` of Adam with peak rate `lr` (linear warm-up,
    then cosine decay), shifted by up to `jitter` pixels and mirrored at random in each; `smooth`
    weighs the total variation, each direction's to the power `power`, `small` the images' norms.
    """

    images: int
    iterations: int
    warmup: int
    lr: float
    jitter: int
    smooth: float
    power: float
    small: float

    def __post_init__(self) -> None:
        whole, rate = "a whole number from 1 on", "a number from 0 on"
        require(
            "method.dream",
            self,
            ("images", is_count(self.images), whole),
            ("iterations", is_count(self.iterations), whole),
            ("warmup", self.warmup == 0 or is_count(self.warmup), "a whole number from 0 on"),
            ("jitter", self.jitter == 0 or is_count(self.jitter), "a whole number from 0 on"),
            ("lr", is_positive(self.lr), "a number above 0"),
            ("power", is_positive(self.power), "a number above 0"),
            ("smooth", is_rate(self.smooth), rate),
            ("small", is_rate(self.small), rate),
        )

    def run(
        self, net: nn.Module, *, n_classes: int, low: Tensor, high: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return images (n, C, H, W) as `net` wants them and the classes (n,) they stand for.

        Of every image, the state with the least loss is kept.

        Args:
            net: in eval mode; its parameters are left alone.
            n_classes: of its logits.
            low: the least value that a pixel may have, (C,).
            high: the largest.
            size: height and width in pixels.
        """
        generator = torch.Generator().manual_seed(0)
        classes = torch.randperm(n_classes, generator=generator)
        labels = classes.repeat(-(-self.images // n_classes))[: self.images].to(low.device)
        shape = (self.images, len(low), *size)
        pixels = torch.randn(shape, generator=generator).to(low)
        pixels.requires_grad_()
        adam = torch.optim.Adam([pixels], lr=self.lr, betas=(0.5, 0.9))
        floor, ceiling = low[:, None, None], high[:, None, None]
        best = torch.full((self.images,), torch.inf, device=low.device)
        kept = pixels.detach().clone()
        wanted = [parameter.requires_grad for parameter in net.parameters()]
        net.requires_grad_(False)
        for step in range(self.iterations):
            adam.param_groups[0]["lr"] = self.lr * self._pace(step)
            shifts = [
                int(torch.randint(-self.jitter, self.jitter + 1, (), generator=generator))
                for _ in size
            ]
            seen = torch.roll(pixels, shifts, dims=(2, 3))
            if torch.rand((), generator=generator) < 0.5:
                seen = seen.flip(3)
            losses = F.cross_entropy(net(seen), labels, reduction="none")
            with torch.no_grad():
                better = losses < best
                best = torch.where(better, losses, best)
                kept[better] = pixels[better]
            adam.zero_grad()
            (
                losses.mean() + self.smooth * variation(pixels, self.power) + self._norm(pixels)
            ).backward()  # type: ignore[no-untyped-call]
            adam.step()
            with torch.no_grad():
                pixels.copy_(torch.minimum(torch.maximum(pixels, floor), ceiling))
        for parameter, trained in zip(net.parameters(), wanted, strict=True):
            parameter.requires_grad_(trained)
        return kept, labels

    def _pace(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        through = (step - self.warmup) / max(self.iterations - self.warmup, 1)
        return 0.5 + 0.5 * math.cos(math.pi * through)

    def _norm(self, pixels: Tensor) -> Tensor:
        norms: Tensor = pixels.flatten(1).norm(dim=1)
        return self.small * norms.mean()


def sheet(images: Tensor, spec: ImageSpec, path: Path) -> None:
    """Write images (n, C, H, W), prepared as `spec` says, side by side into one PNG."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1)
    write(path, lambda at: save_image(pixels, at, nrow=10, format="png"))


def variation(images: Tensor, power: float) -> Tensor:
    """Return the total variation of all images (n, C, H, W) together, eq. 5.

    >>> variation(torch.ones(1, 1, 3, 3), 1.0).item()
    0.0
    """
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    total = images.new_zeros(())
    for difference in (right, down, falling, rising):
        length = difference.norm()
        # where nothing varies, a power below 1 has no slope
        total = total + torch.where(length > 0, length.clamp_min(1e-12) ** power, length)
    return total
