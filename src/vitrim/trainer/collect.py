"""The scorer that only looks: it keeps a few images for closed-form work on both networks."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.plan import Evidence


class Collect(LightningModule):
    """Keep `images` calibration images, (n, C, H, W), of the training set; nothing is trained.

    Evidence has them under `moments["images"]["pixels"]`; it is empty where no image was seen.
    """

    resumes_at = "never"

    pixels: Tensor

    def __init__(self, net: nn.Module, *, images: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.epochs = 1
        self.samples = images
        self.settings: dict[str, Any] = {"images": images}
        self.register_buffer("pixels", torch.empty(0))
        self._chunks: list[Tensor] = []

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained."""

    def training_step(self, batch: Any, batch_index: int) -> None:
        """Take in one batch of images (B, C, H, W)."""
        self._chunks.append(batch[0].float().cpu())

    def on_train_end(self) -> None:
        """Put the batches together."""
        self.pixels = torch.cat(self._chunks)
        self._chunks = []

    def evidence(self) -> Evidence:
        """Return the images."""
        if not self.pixels.numel():
            return Evidence(scores={})
        return Evidence(scores={}, moments={"images": {"pixels": self.pixels.cpu()}})
