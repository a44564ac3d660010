"""Recoverability of blocks: how far the features are off without one, once an adaptor stands in.

PRACTISE (arXiv 2202.07861) puts linear adaptors around a removed block and trains them; here one
linear map takes the block's place, x + A x + c, solved by least squares on what entered and left
the block, so that all blocks are judged in two passes over the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments
from vitrim.closed_form.reconstruction import fitted
from vitrim.plan import BLOCKS, Evidence
from vitrim.trainer.calibrate import Sampling, full_precision


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


class Recover(LightningModule):
    """Score blocks by the mean squared error of the features without them (higher: keep it).

    Evidence has one score a block, under "blocks". `adaptors` says whether something stands in for
    a removed block; `ridge` is relative to the mean variance of what enters it.
    """

    resumes_at = "never"

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
        self.samples = sampling.images
        self.sampling = sampling
        self.adaptors = adaptors
        self.ridge = ridge
        self.epochs = 2 if blocks else 0
        self.settings: dict[str, Any] = {
            "blocks": self.blocks,
            "sampling": asdict(sampling),
            "adaptors": adaptors,
            "ridge": ridge,
        }
        self.register_buffer("scores", torch.empty(0))
        self._moments: dict[str, Moments] = {}
        self._stand_ins: dict[str, nn.Module] = {}
        self._errors: list[float] = []
        self._seen = 0

    def on_train_start(self) -> None:
        """Look at the network as it is used."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained by gradient."""

    @torch.no_grad()
    def training_step(self, batch: Any, batch_index: int) -> None:
        """Take in a batch of images (B, C, H, W); in the second epoch, judge the stand-ins."""
        with full_precision(batch[0]):
            (self._judge if self.current_epoch else self._take_in)(batch[0])

    def on_train_epoch_end(self) -> None:
        """Solve the adaptors, then close the scores."""
        if self.current_epoch == 0:
            self._stand_ins = {
                block: self._stand_in(block).to(self.device) for block in self.blocks
            }
            self._errors = [0.0] * len(self.blocks)
        else:
            self.scores = torch.tensor(self._errors, dtype=torch.float64) / self._seen

    def _take_in(self, images: Tensor) -> None:
        flows: dict[str, tuple[Tensor, Tensor]] = {}

        def note(block: str) -> Any:
            return lambda module, args, output: flows.__setitem__(block, (args[0], output))

        handles = [
            self.net.get_submodule(block).register_forward_hook(note(block))
            for block in self.blocks
        ]
        try:
            self.net(images)
        finally:
            for handle in handles:
                handle.remove()
        for block, (x, y) in flows.items() if self.adaptors else ():
            x, y = (t.movedim(channels_of(self.net, block), -1).flatten(1, -2) for t in (x, y))
            stride = max(1, x.shape[1] // (self.sampling.each or x.shape[1]))
            x, y = (t[:, ::stride].flatten(0, 1) for t in (x, y))
            moments = self._moments.setdefault(block, Moments(block, 2 * x.shape[1]))
            moments.add(torch.cat([x, y - x], dim=-1), torch.ones(len(x), device=x.device))

    def _stand_in(self, block: str) -> nn.Module:
        if not self.adaptors:
            return nn.Identity()
        moments = self._moments.pop(block)
        moments.finish()
        size = len(moments.mean) // 2
        weight, bias = fitted(moments.tensors(), size, self.ridge, biased=True)
        dtype = next(self.net.parameters()).dtype
        return Adaptor(weight.to(dtype), bias.to(dtype), channels_of(self.net, block))

    def _judge(self, images: Tensor) -> None:
        self._seen += len(images)
        aim = self.net.forward_features(images)  # type: ignore[operator]
        for at, (block, stand_in) in enumerate(self._stand_ins.items()):
            whole = self.net.get_submodule(block)
            self.net.set_submodule(block, stand_in)
            found = self.net.forward_features(images)  # type: ignore[operator]
            self.net.set_submodule(block, whole)
            self._errors[at] += len(images) * float(F.mse_loss(found, aim))

    def evidence(self) -> Evidence:
        """Return the scores; empty where no image was seen."""
        return Evidence(scores={BLOCKS: self.scores} if self.scores.numel() else {})


def channels_of(net: nn.Module, block: str) -> int:
    """Return which dimension of what enters `block` holds the channels."""
    convolves = any(isinstance(part, nn.Conv2d) for part in net.get_submodule(block).modules())
    return 1 if convolves else -1
