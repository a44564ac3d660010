"""How large the parts of the script are, and what they find."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn


class Finding(NamedTuple):
    """One line of the result: what was measured, its value, and the goal that it has."""

    what: str
    value: str
    goal: str = ""
    met: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Where the parts run and how much they do.

    Args:
        device: cuda or cpu.
        name: of the network, timm's.
        args: of the network.
        compiles: whether training steps are compiled.
        batch: images of a training step.
        steps: timed training steps of a turn.
        turns: of each training loop.
        warm_up: training steps before.
        profiled: training steps in the profile.
        batches: images of a pass whose latency is measured.
        repeats: passes.
        synthetic: how many images are optimised.
        iterations: timed iterations of their optimisation, and of a trial.
    """

    device: str
    name: str = "deit_base_patch16_224"
    args: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = True
    batch: int = 256
    steps: int = 20
    turns: int = 3
    warm_up: int = 10
    profiled: int = 20
    batches: tuple[int, ...] = (1, 64)
    repeats: int = 50
    synthetic: int = 50
    iterations: int = 50

    def net(self, **more: Any) -> nn.Module:
        """Return the network with random weights, always the same ones, on the device."""
        torch.manual_seed(0)
        return timm.create_model(self.name, **self.args, **more).to(self.device)

    @property
    def side(self) -> int:
        """The side of the images in pixels."""
        return int(self.args.get("img_size", 224))

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return int(self.args.get("num_classes", 1000))

    def images(self, n: int) -> Tensor:
        """Return random images on the device."""
        return torch.randn(n, 3, self.side, self.side, device=self.device)

    def bf16(self) -> AbstractContextManager[Any]:
        """Return the precision of training."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)


FULL = Scale(device="cuda")
TINY = Scale(
    device="cpu",
    name="vit_tiny_patch16_224",
    args={"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10},
    compiles=False,
    batch=4,
    steps=2,
    turns=1,
    warm_up=1,
    profiled=2,
    batches=(1, 2),
    repeats=1,
    synthetic=2,
    iterations=2,
)
