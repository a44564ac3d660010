"""How long and how fast a phase trains: plain numbers, and the optimiser and schedule they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vitrim.errors import ConfigError, is_count, is_positive, is_rate, shown
from vitrim.trainer.optimizers import new_optimizer, new_schedule, optimizer_names, schedule_names

NEUTRAL: Mapping[str, object] = {
    **{"reference_batch": None, "optimizer": "adamw", "momentum": None, "layer_decay": None},
    **{"scheduler": "cosine", "min_lr": 0.0, "warmup_lr": None, "decay_epochs": None},
    **{"decay_rate": None, "ema_decay": 0.0, "repeats": 1, "keep": "last"},
}
"""Numbers of a recipe that later versions added, with the values by which earlier ones acted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """An optimiser and a schedule with linear warm-up, per step; by default AdamW and a cosine.

    Args:
        epochs: passes over the training set.
        lr: the peak of the learning rate.
        weight_decay: does not apply to biases and norms.
        warmup_epochs: before the peak.
        clip_norm: bound on the norm of the gradients; 0: unbounded.
        reference_batch: images per step, over all devices, that `lr` is for: with other batches
            `lr` is scaled linearly, as DeiT does, and no other rate. None: it is not scaled.
        optimizer: a name of timm's (`timm.optim.list_optimizers`).
        momentum: of an optimiser with one; None: timm's.
        layer_decay: the rate of each layer is that of the next one times this; None: equal rates.
        scheduler: cosine, constant, or a name of timm's: poly, tanh, step.
        min_lr: the rate at the end.
        warmup_lr: the rate at the start; None: the first step's share of the warm-up.
        decay_epochs: between two decays, of scheduler=step.
        decay_rate: of these.
        ema_decay: of a moving average of the weights, per step, which is what remains; 0: none.
        repeats: views of an image in an epoch (repeated augmentation), which then has as many steps
            and fewer different images.
        keep: the weights of the "last" epoch remain, or those that were "best" in a validation.
    """

    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: float
    clip_norm: float
    reference_batch: int | None = None
    optimizer: str = "adamw"
    momentum: float | None = None
    layer_decay: float | None = None
    scheduler: str = "cosine"
    min_lr: float = 0.0
    warmup_lr: float | None = None
    decay_epochs: float | None = None
    decay_rate: float | None = None
    ema_decay: float = 0.0
    repeats: int = 1
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        if self.epochs != 0 and not is_count(self.epochs):
            raise ConfigError(f"epochs={self.epochs}: expected a whole number from 0 on")
        for name in ("lr", "weight_decay", "warmup_epochs", "clip_norm", "min_lr"):
            if not is_rate(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number from 0 on")
        if self.reference_batch is not None and not is_count(self.reference_batch):
            raise ConfigError(
                f"reference_batch={self.reference_batch}: expected null or a whole number from 1 on"
            )
        for name, wrong in self._refused():
            raise ConfigError(f"{name}={shown(getattr(self, name))}: {wrong}")

    def _refused(self) -> list[tuple[str, str]]:
        """Return the keys that cannot work, or would not act, and why."""
        steps, adam = self.scheduler == "step", str(self.optimizer).startswith("adam")
        rules = (
            (
                "optimizer",
                self.optimizer in optimizer_names(),
                "a name of timm.optim.list_optimizers()",
            ),
            (
                "scheduler",
                self.scheduler in schedule_names(),
                f"one of {', '.join(schedule_names())}",
            ),
            ("momentum", not (adam and self.momentum is not None), "null with this optimizer"),
            ("momentum", self.momentum is None or _is_share(self.momentum), "from 0 to below 1"),
            ("layer_decay", self.layer_decay is None or _is_decay(self.layer_decay), "up to 1"),
            ("min_lr", not self.min_lr or self.scheduler != "constant", "0 with a constant rate"),
            ("min_lr", self.min_lr <= self.lr or not self.epochs, "at most lr"),
            ("warmup_lr", self.warmup_lr is None or is_rate(self.warmup_lr), "a number from 0 on"),
            ("warmup_lr", self.warmup_lr is None or self.warmup_epochs > 0, "null without warm-up"),
            ("decay_epochs", _fits(self.decay_epochs, steps), "above 0 with scheduler=step only"),
            ("decay_rate", _fits(self.decay_rate, steps), "above 0 with scheduler=step only"),
            ("ema_decay", _is_share(self.ema_decay), "a decay from 0 to below 1"),
            ("repeats", is_count(self.repeats), "a whole number from 1 on"),
            ("keep", self.keep in ("last", "best"), "last or best"),
        )
        return [(name, f"expected {expected}") for name, fits, expected in rules if not fits]

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
        return replace(self, lr=lr, min_lr=min(self.min_lr, lr), reference_batch=None)

    def settings(self) -> dict[str, object]:
        """Return the numbers that identify a result, without those that are `NEUTRAL`.

        So results from before there were these numbers are still found.
        """
        return {k: v for k, v in asdict(self).items() if k not in NEUTRAL or v != NEUTRAL[k]}

    def refuse(self, phase: str, *names: str) -> None:
        """Refuse numbers that a phase would ignore.

        Raises:
            ConfigError: naming the phase, the key and its value.
        """
        for name in names:
            if getattr(self, name) != NEUTRAL[name]:
                raise ConfigError(
                    f"{name}={shown(getattr(self, name))}: {phase} would ignore it: leave it at "
                    f"{shown(NEUTRAL[name])}"
                )


def _is_share(value: object) -> bool:
    return is_rate(value) and float(str(value)) < 1


def _is_decay(value: object) -> bool:
    return is_positive(value) and float(str(value)) <= 1


def _fits(value: object, wanted: bool) -> bool:
    return is_positive(value) if wanted else value is None


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
) -> tuple[Optimizer, LRScheduler]:
    """Return the optimiser of `net` and its schedule, to be stepped after each of `steps` batches.

    `extra` adds parameter groups with a learning rate of their own, which the schedule scales in
    the same way.
    """
    optimizer = new_optimizer(
        net,
        recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        layer_decay=recipe.layer_decay,
        extra=extra,
        clips=recipe.clip_norm > 0,
    )
    per_epoch = steps / max(recipe.epochs, 1)
    schedule = new_schedule(
        optimizer,
        recipe.scheduler,
        lr=recipe.lr,
        steps=steps,
        warmup=per_epoch * recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        decay=(per_epoch * (recipe.decay_epochs or 0), recipe.decay_rate or 1.0),
    )
    return optimizer, schedule
