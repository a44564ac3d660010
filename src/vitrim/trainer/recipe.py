"""How long and how fast a phase trains: plain numbers, and the optimiser and schedule they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from vitrim.errors import ConfigError, is_count, is_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """AdamW with linear warm-up and cosine decay to zero, per step.

    `lr` is the peak. `weight_decay` does not apply to biases and norms. `clip_norm` bounds the norm
    of the gradients (0: unbounded). `epochs` and `warmup_epochs` count passes over the training
    set.
    """

    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: float
    clip_norm: float

    def __post_init__(self) -> None:
        if self.epochs != 0 and not is_count(self.epochs):
            raise ConfigError(f"epochs={self.epochs}: expected a whole number from 0 on")
        for name in ("lr", "weight_decay", "warmup_epochs", "clip_norm"):
            if not is_rate(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number from 0 on")


def adamw_cosine(
    net: nn.Module, recipe: Recipe, *, steps: int, extra: Sequence[Mapping[str, object]] = ()
) -> OptimizerLRSchedulerConfig:
    """Return what `configure_optimizers` returns: see `optimizer_and_schedule`."""
    optimizer, scheduler = optimizer_and_schedule(net, recipe, steps=steps, extra=extra)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def optimizer_and_schedule(
    net: nn.Module, recipe: Recipe, *, steps: int, extra: Sequence[Mapping[str, object]] = ()
) -> tuple[AdamW, LambdaLR]:
    """Return the optimiser of `net` and its schedule, to be stepped after each of `steps` batches.

    `extra` adds parameter groups with a learning rate of their own, which the schedule scales in
    the same way.
    """
    groups = [*param_groups_weight_decay(net, recipe.weight_decay), *extra]
    optimizer = AdamW([group for group in groups if len(group["params"])], lr=recipe.lr)
    warmup = steps * recipe.warmup_epochs / max(recipe.epochs, 1)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0))

    return optimizer, LambdaLR(optimizer, scale)
