"""A run within somebody's process: it leaves no trace there, and shows one progress bar."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vitrim.jobs import signals

_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore random numbers, signal handlers and Lightning's variables at the end.

    A signal that stops the run is raised again afterwards, with the handlers of before: Ctrl-C is a
    KeyboardInterrupt.
    """
    python, numpy = random.getstate(), np.random.get_state()
    known = {name: os.environ.get(name) for name in _SEEDS}
    stopped: int | None = None
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), signals.handled():
            try:
                yield
            except signals.Preempted:
                stopped = signals.received()
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for name, value in known.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    if stopped is not None:
        signal.raise_signal(stopped)
        raise KeyboardInterrupt


@contextmanager
def trainers(
    *, accelerator: str, devices: int | list[int], progress: bool, evaluates: bool
) -> Iterator[Callable[..., Trainer]]:
    """Yield what makes the Trainer of each phase; one bar shows all of them."""
    console = Console(stderr=True)
    shown = progress and (console.is_terminal or console.is_jupyter)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True) if shown else None

    def make(**options: object) -> Trainer:
        options["callbacks"] = [*options.get("callbacks", ()), *([_Bar(bar)] if bar else ())]  # type: ignore[misc]
        settings: dict[str, object] = {
            "accelerator": accelerator,
            "devices": devices,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": 10,
            "log_every_n_steps": 1,
            "precision": "32-true",
            **({} if evaluates else {"limit_val_batches": 0}),
        }
        return Trainer(**{**settings, **options})  # type: ignore[arg-type]

    with bar or nullcontext():
        yield make


class _Bar(Callback):
    """Show the batches of a phase in a bar that all phases share."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task: TaskID | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a new phase."""
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        batches = trainer.num_training_batches * (trainer.max_epochs or 1)
        self.task = self.bar.add_task(type(pl_module).__name__, total=batches)

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        """Advance by one batch."""
        if self.task is not None:
            self.bar.advance(self.task)
