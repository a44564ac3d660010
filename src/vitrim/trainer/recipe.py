"""How long and how fast a phase trains: plain numbers, and the optimiser and schedule they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from lightning import Trainer
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
    set. `reference_batch` is the number of images per step, over all devices, that `lr` is for:
    with other batches `lr` is scaled linearly, as DeiT does. None: `lr` is not scaled.
    """

    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: float
    clip_norm: float
    reference_batch: int | None = None

    def __post_init__(self) -> None:
        if self.epochs != 0 and not is_count(self.epochs):
            raise ConfigError(f"epochs={self.epochs}: expected a whole number from 0 on")
        for name in ("lr", "weight_decay", "warmup_epochs", "clip_norm"):
            if not is_rate(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number from 0 on")
        if self.reference_batch is not None and not is_count(self.reference_batch):
            raise ConfigError(
                f"reference_batch={self.reference_batch}: expected null or a whole number from 1 on"
            )

    def lr_factor(self, images_per_step: int) -> float:
        """Return what learning rates are multiplied by in steps of so many images.

        >>> numbers = ("epochs", "lr", "weight_decay", "warmup_epochs", "clip_norm")
        >>> none = dict.fromkeys(numbers, 0)
        >>> Recipe(**none, reference_batch=1024).lr_factor(2048), Recipe(**none).lr_factor(2048)
        (2.0, 1.0)
        """
        return 1.0 if self.reference_batch is None else images_per_step / self.reference_batch

    def scaled(self, images_per_step: int) -> Recipe:
        """Return the recipe with `lr` as it is in steps of so many images."""
        lr = self.lr * self.lr_factor(images_per_step)
        return replace(self, lr=lr, reference_batch=None)

    def settings(self) -> dict[str, object]:
        """Return the numbers that identify a result, without a `reference_batch` that is not set.

        So results from before there was a `reference_batch` are still found.
        """
        numbers = asdict(self)
        if self.reference_batch is None:
            del numbers["reference_batch"]
        return numbers


def images_per_step(trainer: Trainer) -> int:
    """Return the number of images in one optimiser step of `trainer`, over all its processes.

    The trainer has loaded its training data already (`Trainer.estimated_stepping_batches` does).
    """
    loader = trainer.train_dataloader
    assert loader is not None
    batch: int = loader.batch_sampler.batch_size
    return batch * trainer.world_size * trainer.accumulate_grad_batches


def scaled_to(trainer: Trainer, recipe: Recipe) -> Recipe:
    """Return the recipe with the learning rate for the batches of `trainer`."""
    if recipe.reference_batch is None:
        return recipe
    return recipe.scaled(images_per_step(trainer))


def adamw_cosine(
    net: nn.Module, recipe: Recipe, trainer: Trainer, *, extra: Sequence[Mapping[str, object]] = ()
) -> OptimizerLRSchedulerConfig:
    """Return what `configure_optimizers` returns, for the steps and batches of `trainer`.

    See `optimizer_and_schedule`; the learning rates in `extra` are not scaled to the batch.
    """
    steps = int(trainer.estimated_stepping_batches)
    scaled = scaled_to(trainer, recipe)
    optimizer, scheduler = optimizer_and_schedule(net, scaled, steps=steps, extra=extra)
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
