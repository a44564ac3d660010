"""The record of a run: JSON lines on disk first, then W&B or TensorBoard, which may fail."""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

_log = logging.getLogger(__name__)

_LIMITS: Mapping[str, Any] = {
    "init_timeout": 10.0,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
}
"""Seconds that an unreachable W&B may cost; older releases know the first of them only."""

Sink = Callable[[Mapping[str, float], int], None]


class Tracker(Logger):
    """Write every phase's metrics to `metrics.jsonl` of the run's folder, and on to one service."""

    phase: str = ""

    def __init__(
        self, folder: Path, tracking: str, *, group: str, config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self._file = folder / "metrics.jsonl"
        self._torn = False
        self._finish: Callable[[Mapping[str, Any]], None] = lambda summary: None
        self._sink: Sink | None = None
        if tracking in ("offline", "online"):
            self._guard(lambda: self._start_wandb(folder, tracking, group, config))
        elif tracking == "tensorboard":
            self._guard(lambda: self._start_tensorboard(folder))

    @property
    def name(self) -> str:
        """Name for Lightning."""
        return "vitrim"

    @property
    def version(self) -> str:
        """Version for Lightning."""
        return self.phase

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the recipe stands in recipe.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line of metrics, then pass them on."""
        named = {f"{self.phase}/{name}": value for name, value in metrics.items()}
        self._append(json.dumps({"phase": self.phase, "step": step, **metrics}))
        sink = self._sink
        if sink is not None:
            self._guard(lambda: sink(named, step or 0))

    def close(self, summary: Mapping[str, Any]) -> None:
        """Hand the final numbers over, plain and nested ones alike, and end the service's run."""
        self._guard(lambda: self._finish(summary))

    def _append(self, line: str) -> None:
        """Write a line; a disk that is full or gone costs lines, and not the run."""
        start = "\n" if self._torn else ""  # ends what a full disk left half written
        try:
            with self._file.open("a") as file:
                file.write(f"{start}{line}\n")
        except OSError as error:
            if not self._torn:
                _log.warning("metrics are lost: cannot write %s (%s)", self._file, error)
            self._torn = True
        else:
            self._torn = False

    def _guard(self, action: Callable[[], None]) -> None:
        """Run what concerns the service only; after its first failure, go on without it."""
        try:
            action()
        except (Exception, SystemExit) as error:  # a service may fail in any way
            self._sink = None
            self._finish = lambda summary: None
            _log.warning("tracking goes on in %s only: %s", self._file.name, error)

    def _start_wandb(self, folder: Path, mode: str, group: str, config: Mapping[str, Any]) -> None:
        import wandb

        limits = {k: v for k, v in _LIMITS.items() if k in wandb.Settings.model_fields}
        with _nobody_to_ask():
            run = wandb.init(
                project="vitrim",
                dir=folder,
                mode=mode,  # type: ignore[arg-type]
                group=group,
                name=folder.name,
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, **limits),
            )
        run.define_metric("top1", step_metric="strength")
        run.define_metric("macs", step_metric="strength")

        def finish(summary: Mapping[str, Any]) -> None:
            run.log({key: value for key, value in _point(summary).items() if value is not None})
            run.summary.update(dict(summary))
            run.finish()

        self._sink = lambda metrics, step: run.log({**metrics, "trainer/step": step})
        self._finish = finish

    def _start_tensorboard(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder))

        def sink(metrics: Mapping[str, float], step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        def finish(summary: Mapping[str, Any]) -> None:
            for name, value in _point(summary).items():
                if value is not None:
                    writer.add_scalar(f"curve/{name}", value, 0)
            writer.close()

        self._sink, self._finish = sink, finish


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Take the terminal away: without a key W&B fails then at once, instead of asking for one."""
    terminal = sys.stdin
    with Path(os.devnull).open() as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = terminal


def _point(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the run's point on the strength-accuracy curve."""
    compact = summary["compact"]
    return {"strength": summary["strength"], "top1": compact["top1"], "macs": compact["macs"]}
