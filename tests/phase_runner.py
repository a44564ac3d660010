"""A runner of phases on the digits, and what stops a phase, for tests of single phases."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from vitrim.data import ImageSpec
from vitrim.data.digits import Digits
from vitrim.trainer.phases import PhaseRunner
from vitrim.trainer.tracking import Tracker

SPEC = ImageSpec(
    channels=1, size=(8, 8), mean=(0.3,), std=(0.4,), interpolation="bicubic", crop_pct=1.0
)
DIGITS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
"""Arguments of `small_net` that fit the digits."""


def runner(folder: Path, *, minutes: float = 60.0, batch_size: int = 256) -> PhaseRunner:
    """Return a runner that works in `folder`: on the CPU, with seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = Digits(
        batch_size=batch_size, held_out=0.2, shift=1.0, rotation=10.0, label_smoothing=0.1
    )
    return PhaseRunner(
        trainer=partial(
            Trainer,
            accelerator="cpu",
            devices=1,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=2,
            log_every_n_steps=1,
        ),
        data=digits.module(SPEC),
        tracker=Tracker(folder, "none", group="", config={}),
        folder=folder,
        shared=folder,
        seed=0,
        progress=False,
        checkpoint_minutes=minutes,
        batchnorm_images=32,
    )


class At(Callback):
    """Does something when a step begins, counted from 1."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step = step
        self.action = action

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.step:
            self.action()


def killed() -> None:
    raise SystemError("as a kill would: nothing is saved")


def stop(number: int = signal.SIGTERM) -> Callable[[], None]:
    """Return what sends this process a signal."""
    return partial(os.kill, os.getpid(), number)
