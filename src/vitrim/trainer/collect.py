"""The scorer that keeps a few calibration images, for methods in closed form."""

from __future__ import annotations

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.plan import Evidence
from vitrim.trainer.phase import ResumePoint


class Collect(LightningModule):
    """Keep `images` calibration images, (n, C, H, W), of the training set; nothing is trained.

    They are the `images` of its evidence, which has none where no image was seen.
    """

    resumes_at: ResumePoint = "never"
    clip_norm = 0.0
    trains = False

    pixels: Tensor

    def __init__(self, net: nn.Module, *, images: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.epochs = 1
        self.calibration_images = images
        self.settings: dict[str, object] = {"images": images}
        self.register_buffer("pixels", torch.empty(0))
        self._chunks: list[Tensor] = []

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Keep one batch of images (B, C, H, W)."""
        self._chunks.append(batch[0].float().cpu())

    def on_train_end(self) -> None:
        """Concatenate the batches."""
        self.pixels = torch.cat(self._chunks)
        self._chunks = []

    def evidence(self) -> Evidence:
        """Return the images."""
        return Evidence(images=self.pixels.cpu() if self.pixels.numel() else None)
