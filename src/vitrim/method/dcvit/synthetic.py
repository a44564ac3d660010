"""Synthetic images of a network, to evaluate other networks on where there are few real images.

The image prior of DeepInversion on DeepDream, as DC-ViT uses it (arXiv 2403.18708, eqs. 4 and 5):
starting from noise, pixels are optimised until the network classifies them with confidence, under
penalties on their total variation and on their norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.errors import is_count, is_positive, is_rate, require


class PixelRange(NamedTuple):
    """The least and the largest value of each channel, (C,) each."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, images: Tensor) -> PixelRange:
        """Return the range of some images, (B, C, H, W)."""
        return cls(images.amin((0, 2, 3)), images.amax((0, 2, 3)))

    def union(self, other: PixelRange) -> PixelRange:
        """Return the range of the images of both."""
        return PixelRange(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticImages:
    """How images are optimised; the values of conf/method/dcvit.yaml are those of the paper's code.

    `images` images, of distinct classes as far as there are enough, are optimised by `iterations`
    steps of Adam with `betas` and peak rate `lr` (linear warm-up over `warmup` iterations, then
    cosine decay). In each iteration they are shifted by up to `jitter` pixels and mirrored at
    random. `tv_weight` is the weight of the total variation, in which each direction's is raised to
    the power `tv_exponent`; `l2_weight` that of the images' norms. `batch_size` of them are
    evaluated at a time.
    """

    images: int
    iterations: int
    warmup: int
    lr: float
    betas: Sequence[float]
    jitter: int
    tv_weight: float
    tv_exponent: float
    l2_weight: float
    batch_size: int

    def __post_init__(self) -> None:
        count, rate, natural = (
            f"a {kind} from {least} on"
            for kind, least in (("whole number", 1), ("number", 0), ("whole number", 0))
        )
        decays = len(self.betas) == 2 and all(is_rate(beta) and beta < 1 for beta in self.betas)
        require(
            "method.synthetic",
            self,
            ("images", is_count(self.images), count),
            ("iterations", is_count(self.iterations), count),
            ("batch_size", is_count(self.batch_size), count),
            ("warmup", self.warmup == 0 or is_count(self.warmup), natural),
            ("jitter", self.jitter == 0 or is_count(self.jitter), natural),
            ("lr", is_positive(self.lr), "a number above 0"),
            ("betas", decays, "two numbers from 0 to below 1"),
            ("tv_exponent", is_positive(self.tv_exponent), "a number above 0"),
            ("tv_weight", is_rate(self.tv_weight), rate),
            ("l2_weight", is_rate(self.l2_weight), rate),
        )

    @torch.enable_grad()
    def run(
        self,
        net: nn.Module,
        *,
        n_classes: int,
        pixels: PixelRange,
        size: tuple[int, int],
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return images (n, C, H, W), normalised for `net`, and their classes, (n,).

        Of every image, the state with the lowest loss is returned. The result depends on `net` and
        the arguments only.

        Args:
            net: in eval mode; its parameters are not changed.
            n_classes: of its logits.
            pixels: the range that pixel values are clamped to.
            size: height and width in pixels.
            seed: of the classes, the noise that images begin as, and what moves them.
        """
        low, high = pixels
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randperm(n_classes, generator=generator)
        labels = classes.repeat(-(-self.images // n_classes))[: self.images].to(low.device)
        images = torch.randn((self.images, len(low), *size), generator=generator).to(low)
        images.requires_grad_()
        adam = torch.optim.Adam([images], lr=self.lr, betas=(self.betas[0], self.betas[1]))
        lowest = torch.full((self.images,), torch.inf, device=low.device)
        best = images.detach().clone()
        with _constant(net):
            for step in range(self.iterations):
                adam.param_groups[0]["lr"] = self.lr * self._lr_factor(step)
                logits = net(self._augmented(images, generator))
                losses = F.cross_entropy(logits, labels, reduction="none")
                with torch.no_grad():
                    better = losses < lowest
                    lowest = torch.where(better, losses, lowest)
                    best[better] = images[better]
                smoothness = self.tv_weight * total_variation(images, self.tv_exponent)
                adam.zero_grad()
                (losses.mean() + smoothness + self._norm(images)).backward()  # type: ignore[no-untyped-call]
                adam.step()
                with torch.no_grad():
                    images.copy_(torch.clamp(images, low[:, None, None], high[:, None, None]))
        return best, labels

    def _lr_factor(self, step: int) -> float:
        """Return the share of the peak learning rate: linear warm-up, then cosine decay."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.iterations - self.warmup, 1)
        return 0.5 + 0.5 * math.cos(math.pi * progress)

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images shifted, all by the same random number of pixels, and mirrored."""
        shifts = [
            int(torch.randint(-self.jitter, self.jitter + 1, (), generator=generator))
            for _ in range(2)
        ]
        shifted = torch.roll(images, shifts, dims=(2, 3))
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        return shifted.flip(3) if mirrored else shifted

    def _norm(self, images: Tensor) -> Tensor:
        """Return the penalty on the mean norm of the images."""
        norms: Tensor = images.flatten(1).norm(dim=1)
        return self.l2_weight * norms.mean()


@contextmanager
def _constant(net: nn.Module) -> Iterator[None]:
    """Compute no gradients for the parameters of `net` inside the block."""
    required = [parameter.requires_grad for parameter in net.parameters()]
    net.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in zip(net.parameters(), required, strict=True):
            parameter.requires_grad_(requires_grad)


def total_variation(images: Tensor, exponent: float) -> Tensor:
    """Return the total variation of all images (n, C, H, W) together, eq. 5.

    >>> total_variation(torch.ones(1, 1, 3, 3), 1.0).item()
    0.0
    """
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    total = images.new_zeros(())
    for difference in (right, down, falling, rising):
        length = difference.norm()
        # of constant images, a power below 1 has no finite gradient
        total = total + torch.where(length > 0, length.clamp_min(1e-12) ** exponent, length)
    return total
