"""Distillation with labels: the network learns from them and from a teacher (DeiT, 2012.12877).

    hard: (1 - alpha) CE(student, y) + alpha CE(student, argmax of the teacher)       (eq. 3)
    soft: (1 - alpha) CE(student, y) + alpha T^2 KL(teacher / T || student / T)       (eq. 2)

The paper has alpha 1/2 with hard, and alpha 0.1 and T = 3 with soft distillation. KL is a mean over
images; the authors' code divides it by the number of classes as well. There is no distillation
token: the one classifier learns from both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.data import ImageSpec
from vitrim.trainer.mimic import soft_loss

Kind = Literal["hard", "soft"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """A teacher, and how its outputs enter the loss.

    Args:
        teacher: maps images (B, C, H, W), as it expects them, to logits (B, classes).
        kind: hard or soft.
        alpha: weight of the teacher, from 0 to 1.
        temperature: of soft distillation.
        images: how the images of the run are prepared.
        expected: how the teacher expects them.
        settings: what identifies the teacher and the numbers above.
    """

    teacher: nn.Module
    kind: Kind
    alpha: float
    temperature: float
    images: ImageSpec
    expected: ImageSpec
    settings: dict[str, object]

    def loss(self, images: Tensor, logits: Tensor, of_labels: Tensor) -> Tensor:
        """Return the loss of a batch, of which the loss towards its labels is known.

        Args:
            images: the batch (B, C, H, W) that the student saw.
            logits: the student's (B, classes).
            of_labels: the cross-entropy of these with the labels.
        """
        with torch.no_grad():
            target = self.teacher.to(images.device).eval()(self.view(images))
        of_teacher = (
            F.cross_entropy(logits, target.argmax(-1))
            if self.kind == "hard"
            else soft_loss(logits.float(), target.float(), self.temperature)
        )
        return (1 - self.alpha) * of_labels + self.alpha * of_teacher

    def view(self, images: Tensor) -> Tensor:
        """Return the images (B, C, H, W) in the size and the normalisation of the teacher."""
        if images.shape[-2:] != self.expected.size:
            images = F.interpolate(
                images, self.expected.size, mode="bicubic", align_corners=False, antialias=True
            )
        mean, std = (_per_channel(values, images) for values in (self.images.mean, self.images.std))
        its_mean, its_std = (
            _per_channel(values, images) for values in (self.expected.mean, self.expected.std)
        )
        return (images * std + (mean - its_mean)) / its_std


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """Return numbers per channel as a tensor (C, 1, 1) like the images.

    timm has three for every network: grey images have the first.
    """
    own = [*values][: images.shape[1]]
    return torch.as_tensor(own, dtype=images.dtype, device=images.device).view(-1, 1, 1)
