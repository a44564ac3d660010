"""What a phase shows while it trains: the progress bar, and how fast images go through.

Metrics on the device are read once in `READ_EVERY` batches: a read waits for the device. So phases
log the losses of steps without `prog_bar=True`, for which Lightning reads them in every step.
"""

from __future__ import annotations

import logging
import time

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from vitrim.trainer.recipe import images_per_step
from vitrim.trainer.tracking import Tracker

_log = logging.getLogger(__name__)
READ_EVERY = 50
STARVED = 0.3
"""Share of the time spent waiting for images above which a warning is logged, on a GPU."""
_AFTER_S = 20.0
ESTIMATED_AFTER = 20
"""Batches of a phase after which the time that remains is logged."""
WORTH_SAYING_S = 60.0
"""Seconds that remain below which it is not."""


class Speed(Callback):
    """Measure images per second and the share of the time that is spent waiting for images.

    With the learning rate, the memory of the GPU and the seconds that remain they go into the
    metrics of a step that is logged (`Tracker.extra`), and into the progress bar.

    Args:
        tracker: that records the metrics.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.found: dict[str, float] = {}
        self._tracker = tracker
        self._began = self._ended = 0.0
        self._waited = 0.0
        self._batches = 0
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        self._began = self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        """Note how long the batch was waited for; the first one starts the loader."""
        if self._batches:
            self._waited += time.perf_counter() - self._ended
        else:
            self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Compute the rates since the start of the phase."""
        self._ended = time.perf_counter()
        self._batches += 1
        seconds = self._ended - self._began
        share = self._waited / max(seconds, 1e-9)
        per_batch = images_per_step(trainer) / trainer.accumulate_grad_batches
        total = trainer.num_training_batches * max(trainer.max_epochs or 0, 1)
        left = total - trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.found = {
            "images_per_s": per_batch * self._batches / max(seconds, 1e-9),
            "waiting": share,
            "eta_s": seconds / self._batches * max(left, 0),
            **_learning_rate(trainer),
            **_memory(trainer.strategy.root_device),
        }
        self._tracker.extra = {name: float(f"{x:.4g}") for name, x in self.found.items()}
        if self._batches == ESTIMATED_AFTER and self.found["eta_s"] >= WORTH_SAYING_S:
            _log.info("%s: about %s left", self._tracker.phase, _duration(self.found["eta_s"]))
        on_gpu = trainer.strategy.root_device.type != "cpu"
        if on_gpu and seconds > _AFTER_S and share > STARVED and not self._warned:
            self._warned = True
            _log.warning("%s", starved(share))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not take the time of a validation for waiting."""
        self._ended = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add nothing to what is logged later."""
        self._tracker.extra = {}


def starved(share: float) -> str:
    """Return the warning that the device waits for images.

    >>> starved(0.62).partition(":")[0]
    '62 % of the time is spent waiting for images'
    """
    return (
        f"{share:.0%} of the time is spent waiting for images: raise data.workers, or use images "
        "that are smaller on disk"
    ).replace("%", " %", 1)


def _learning_rate(trainer: Trainer) -> dict[str, float]:
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {"lr": float(max(rates))} if rates else {}


def _memory(device: torch.device) -> dict[str, float]:
    """Return the most gigabytes that were allocated on a GPU."""
    if device.type != "cuda":
        return {}
    return {"memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}


class Bar(RichProgressBar):
    """A progress bar with the name of the phase, its metrics and its speed.

    Args:
        phase: its name.
        speed: what measures it; None: the speed is not shown.
    """

    def __init__(self, phase: str, speed: Speed | None) -> None:
        super().__init__(leave=False)
        self._phase = phase
        self._speed = speed
        self._shown: dict[str, int | str | float | dict[str, float]] = {}
        self._read_at = -READ_EVERY

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self._phase}, epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    @property
    def validation_description(self) -> str:
        """What the bar of an evaluation begins with."""
        return f"{self._phase}, evaluation" if self._phase else "evaluation"

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what is shown; the metrics of the device are read now and then."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if not trainer.training or batches >= self._read_at + READ_EVERY or batches < self._read_at:
            self._read_at = batches
            items = super().get_metrics(trainer, pl_module)
            items.pop("v_num", None)
            on_device = trainer.callback_metrics if trainer.training else {}
            self._shown = {**items, **{name: f"{x.item():.3g}" for name, x in on_device.items()}}
        found = {} if self._speed is None else self._speed.found
        names = {"images_per_s": "images/s", "waiting": "waiting", "lr": "lr"}
        speed = {names[name]: f"{x:.3g}" for name, x in found.items() if name in names}
        left = {} if "eta_s" not in found else {"left": _duration(found["eta_s"])}
        return {**self._shown, **speed, **left}


def _duration(seconds: float) -> str:
    """Return a time as hours and minutes, or minutes and seconds.

    >>> _duration(7384), _duration(75)
    ('2:03 h', '1:15 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, of_hour = divmod(minutes, 60)
    return f"{hours}:{of_hour:02d} h" if hours else f"{minutes}:{rest:02d} min"
