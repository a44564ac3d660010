"""What surviving costs: a checkpoint within a phase, and going on from one."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from vitrim.data import Loaders
from vitrim.trainer.classify import Classify
from vitrim.trainer.phases import PhaseRunner
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.tracking import Tracker

from .timing import Row

BATCH, IMAGES = 16, 64
INTERVAL = 600.0  # seconds between two checkpoints, by default
OVERHEAD = 3.0  # seconds that going on may take beyond beginning
RECIPE = Recipe(epochs=1, lr=1e-4, weight_decay=0.05, warmup_epochs=0, clip_norm=1.0)


class _Stop(Exception):
    pass


class _Pictures(Loaders):
    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(IMAGES, 3, 224, 224, generator=generator)
        return self.shuffled(TensorDataset(images, torch.arange(IMAGES)), BATCH)

    def val_dataloader(self) -> list[Any]:
        return []

    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[Any]:
        raise NotImplementedError


class _Watch(Callback):
    """Notes when steps begin, and what lies between them; stops before one of them."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.began: list[float] = []
        self.ended: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.began.append(time.perf_counter())
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.stop:
            raise _Stop

    def on_train_batch_end(self, *args: Any) -> None:
        self.ended.append(time.perf_counter())


def rows(repeats: int) -> list[Row]:
    """Return what a checkpoint takes of its interval, and what going on takes."""
    saves, overheads = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            begun, watched = _until(Path(name), stop=3)
            first = watched.began[0] - begun
            # a checkpoint is saved by the callback that is asked last when a step has ended
            saves += [
                began - ended for ended, began in zip(watched.ended, watched.began[1:], strict=True)
            ]
            begun, watched = _until(Path(name), stop=4)
            overheads.append(watched.began[0] - begun - first)
    return [
        Row(
            name="ViT-Ti, a checkpoint",
            peer="ten minutes of training",
            ours_s=saves,
            peer_s=[INTERVAL] * len(saves),
            kind="cost",
            limit=0.02,
        ),
        Row(
            name="ViT-Ti, going on, beyond beginning",
            peer="a limit of 3 s",
            ours_s=overheads,
            peer_s=[OVERHEAD] * len(overheads),
            kind="cost",
            limit=1.0,
        ),
    ]


def phases_in(folder: Path, data: Loaders, **settings: Any) -> PhaseRunner:
    """Return a runner on the CPU that works in `folder`, with seed 0 and nothing shown."""
    return PhaseRunner(
        trainer=partial(Trainer, accelerator="cpu", devices=1, enable_model_summary=False),
        data=data,
        tracker=Tracker(folder, "none", group="", config={}),
        folder=folder,
        shared=folder,
        seed=0,
        progress=False,
        **settings,
    )


def _until(folder: Path, *, stop: int) -> tuple[float, _Watch]:
    """Train until a step, saving after each; return when that began, and what was seen."""
    torch.manual_seed(0)
    phase = Classify(timm.create_model("vit_tiny_patch16_224"), recipe=RECIPE, n_classes=1000)
    phases = phases_in(folder, _Pictures(), checkpoint_minutes=0.0, batchnorm_images=IMAGES)
    watch = _Watch(stop)
    begun = time.perf_counter()
    try:
        phases.run_or_load(folder / "x", phase, name="x", callbacks=[watch])
    except _Stop:
        return begun, watch
    raise AssertionError("the phase ended before it was stopped")
