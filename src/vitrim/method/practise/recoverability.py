"""Recoverability of blocks: the error of the features without a block, once an adaptor replaces it.

PRACTISE (arXiv 2202.07861) puts linear adaptors around a removed block and trains them. Here one
linear map x + A x + c replaces the block, solved by least squares on what entered and left it, so
that all blocks are evaluated in two passes over the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments
from vitrim.closed_form.reconstruction import ridge_fit
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Sampling, full_precision
from vitrim.trainer.phase import ResumePoint


class Adaptor(nn.Module):
    """x + A x + c over the channels of x, which are its dimension `channels`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.channels = channels

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Map x to its own shape."""
        moved = x.movedim(self.channels, -1)
        return x + F.linear(moved, self.weight, self.bias).movedim(-1, self.channels)


class Recoverability(LightningModule):
    """Score blocks by the mean squared error of the features without them (higher: keep it).

    Evidence has one score a block, its `block_scores`. `adaptors` says whether a removed block is
    replaced by one, else by the identity; `ridge` is relative to the mean variance of the block's
    input.
    """

    resumes_at: ResumePoint = "never"
    clip_norm = 0.0
    trains = False
    scores: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        blocks: Sequence[str],
        sampling: Sampling,
        adaptors: bool,
        ridge: float,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.blocks = list(blocks)
        self.calibration_images = sampling.images
        self.sampling = sampling
        self.adaptors = adaptors
        self.ridge = ridge
        self.epochs = 2 if blocks else 0
        self.settings: dict[str, object] = {
            "blocks": self.blocks,
            "sampling": asdict(sampling),
            "adaptors": adaptors,
            "ridge": ridge,
        }
        self.register_buffer("scores", torch.empty(0))
        self._moments: dict[str, Moments] = {}
        self._replacements: dict[str, nn.Module] = {}
        self._errors: list[float] = []
        self._seen = 0

    def on_train_start(self) -> None:
        """Set the network to eval mode, in which it is used."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained by gradient."""

    @torch.no_grad()
    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Gather statistics of images (B, C, H, W); in the second epoch, evaluate replacements."""
        with full_precision(batch[0]):
            (self._evaluate if self.current_epoch else self._gather)(batch[0])

    def on_train_epoch_end(self) -> None:
        """Solve the adaptors after the first epoch; compute the scores after the second."""
        if self.current_epoch == 0:
            self._replacements = {
                block: self._replacement(block).to(self.device) for block in self.blocks
            }
            self._errors = [0.0] * len(self.blocks)
        else:
            self.scores = torch.tensor(self._errors, dtype=torch.float64) / self._seen

    def _gather(self, images: Tensor) -> None:
        """Add what enters and leaves each block to its moments."""
        with _captured(self.net, self.blocks) as flows:
            self.net(images)
        for block, streams in flows.items() if self.adaptors else ():
            channels = channels_of(self.net, block)
            x, y = (stream.movedim(channels, -1).flatten(1, -2) for stream in streams)
            stride = max(1, x.shape[1] // (self.sampling.tokens_per_image or x.shape[1]))
            x, y = (rows[:, ::stride].flatten(0, 1) for rows in (x, y))
            moments = self._moments.setdefault(block, Moments(block, 2 * x.shape[1]))
            moments.add(torch.cat([x, y - x], dim=-1), torch.ones(len(x), device=x.device))

    def _replacement(self, block: str) -> nn.Module:
        """Return what replaces a block: the adaptor, by least squares, or the identity."""
        if not self.adaptors:
            return nn.Identity()
        moments = self._moments.pop(block)
        moments.finish()
        size = len(moments.mean) // 2
        weight, bias = ridge_fit(moments.tensors(), size, self.ridge, biased=True)
        dtype = next(self.net.parameters()).dtype
        return Adaptor(weight.to(dtype), bias.to(dtype), channels_of(self.net, block))

    def _evaluate(self, images: Tensor) -> None:
        """Add the error of the features with each block replaced."""
        self._seen += len(images)
        target = self.net.forward_features(images)  # type: ignore[operator]
        for position, (block, replacement) in enumerate(self._replacements.items()):
            original = self.net.get_submodule(block)
            self.net.set_submodule(block, replacement)
            features = self.net.forward_features(images)  # type: ignore[operator]
            self.net.set_submodule(block, original)
            self._errors[position] += len(images) * float(F.mse_loss(features, target))

    def evidence(self) -> Evidence:
        """Return the scores; empty where no image was seen."""
        if not self.scores.numel():
            return Evidence()
        return Evidence(block_scores=dict(zip(self.blocks, self.scores.tolist(), strict=True)))


@contextmanager
def _captured(net: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record, by block, what enters and what leaves it while `net` runs."""
    flows: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            flows[block] = args[0], output

        return hook

    handles = [net.get_submodule(block).register_forward_hook(hook_of(block)) for block in blocks]
    try:
        yield flows
    finally:
        for handle in handles:
            handle.remove()


def channels_of(net: nn.Module, block: str) -> int:
    """Return which dimension of the input of `block` holds the channels."""
    convolves = any(isinstance(part, nn.Conv2d) for part in net.get_submodule(block).modules())
    return 1 if convolves else -1
