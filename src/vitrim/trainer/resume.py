"""Checkpoints within a phase, two generations of them, and going on from the newest that is whole.

A generation is a folder `<batches>/` of `state.ckpt` and a manifest with its checksums, which is
written last: what a kill, a full disk or a flipped bit leaves behind is not taken for one.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, nn

from vitrim.data.loader import seed_all
from vitrim.errors import VitrimError
from vitrim.files import StoreError, seal, verify, write
from vitrim.jobs import signals

_log = logging.getLogger(__name__)
STATE = "state.ckpt"
GENERATIONS = 2


class DivergedError(VitrimError):
    """A loss that is not finite: the last checkpoint is from before."""


class SafeCheckpointIO(CheckpointIO):
    """Write a checkpoint into a folder so that it is there whole or not at all."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write, flush, read back, and seal with checksums.

        Raises:
            OSError: the disk is full or broken; nothing is left of the attempt.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / STATE, lambda temporary: _dump(checkpoint, temporary))
            seal(folder, (STATE,))
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Return a checkpoint: tensors and plain values, never code.

        Raises:
            StoreError: no folder of this machine, or damaged.
        """
        if "://" in str(path):
            raise StoreError(f"{path}: checkpoints are read from folders, not from addresses")
        verify(Path(path), (STATE,))
        found: dict[str, Any] = torch.load(
            Path(path) / STATE, map_location=map_location, weights_only=True
        )
        return found

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint's folder."""
        shutil.rmtree(path, ignore_errors=True)


def _dump(checkpoint: Mapping[str, Any], path: Path) -> None:
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:  # so torch reports a full disk
        raise OSError(str(error)) from None
    with zipfile.ZipFile(path) as written:
        broken = written.testzip()
    if broken is not None:
        raise OSError(f"{path}: {broken} was not written as it was sent")


def newest(folder: Path) -> Path | None:
    """Return the newest whole generation in `folder`, or None; the rest of writing goes.

    The caller holds the lock: a file that is being written would go, too.
    """
    for stale in (*folder.glob("*/.*"), *(at for at in folder.glob("*") if not any(at.iterdir()))):
        _log.info("%s: left by a run that was killed, removed", stale)
        stale.rmdir() if stale.is_dir() else stale.unlink()
    for at in sorted(folder.glob("*"), key=lambda at: at.name, reverse=True):
        try:
            verify(at, (STATE,))
        except StoreError as error:
            _log.warning("%s; an older checkpoint is taken, or the phase starts over", error)
            shutil.rmtree(at)
        else:
            return at
    return None


def _stop() -> None:
    """Raise Preempted for the signal that came, or for the one that another process was sent."""
    raise signals.Preempted(signals.noted() or signal.SIGTERM)


def size_buffers(phase: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give empty buffers, on whose size the data decides, the size that they have in `state`."""
    for name, buffer in [*phase.named_buffers()]:
        if not buffer.numel() and name in state:
            owner, _, last = name.rpartition(".")
            phase.get_submodule(owner).register_buffer(last, torch.empty_like(state[name]))


class Resume(Checkpoint):
    """Seed every step, save every `minutes` and on a request to stop, stop on a loss gone wrong.

    What a step draws hangs on `seed` and its number alone. With `folder` None nothing is saved. A
    phase whose attribute `resumes_at` is "epoch" or "never" (not "batch") holds more than its
    state: it is saved at the end of an epoch, or not at all, and starts over when it was stopped.
    """

    def __init__(self, folder: Path | None, *, seed: int, minutes: float) -> None:
        self.folder = folder
        self.seed = seed
        self.minutes = minutes
        self._last = time.monotonic()
        self._due = self._stopping = False
        self._place: dict[str, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, which Lightning has just taken, and let the loader go on as well."""
        signals.install()
        self._last = time.monotonic()
        if self._place is not None:
            trainer.train_dataloader.load_state_dict(self._place)  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's place."""
        return {"place": self._place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note the loader's place."""
        self._place = state_dict["place"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, now that the step before is logged; seed batches that no data module blends."""
        if self._stopping:
            _stop()
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            seed_all(self.seed, done, trainer.global_rank)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save where it is due; at an epoch's last batch only after what ends the epoch."""
        diverged, stopping, due = self._agreed(trainer, outputs)
        if diverged:
            raise DivergedError(
                f"{type(pl_module).__name__}: the loss is not finite in epoch "
                f"{trainer.current_epoch}, batch {batch_idx}: lower the learning rate, clip "
                "(clip_norm), or look at the images; the last checkpoint is from before"
            )
        self._stopping = stopping
        resumes_at = getattr(pl_module, "resumes_at", "batch")
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._due = (stopping or due) and resumes_at != "never"
        elif (stopping or due) and resumes_at == "batch":
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due when the last batch ended."""
        if self._due:
            self._save(trainer)
            self._due = False
        if self._stopping:
            _stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, which Lightning may have taken."""
        signals.install()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop an evaluation that can be done again; one inside training ends first."""
        if not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            signals.check()

    def _agreed(self, trainer: Trainer, outputs: Any) -> tuple[bool, bool, bool]:
        """Return what any process has noticed: a loss gone wrong, a signal, time to save."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        late = time.monotonic() - self._last >= 60 * self.minutes
        facts = (
            isinstance(loss, Tensor) and not bool(loss.isfinite().all()),
            signals.noted() is not None,
            late and trainer.is_global_zero,
        )
        if trainer.world_size == 1:
            return facts
        shared = torch.tensor(facts, dtype=torch.int32, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        first, second, third = shared.tolist()
        return bool(first), bool(second), bool(third)

    def _save(self, trainer: Trainer) -> None:
        """Save a generation and remove all but the newest; a full disk is told and survived."""
        if self.folder is None:
            return
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._place = trainer.train_dataloader.state_dict()  # type: ignore[union-attr]
        try:
            trainer.save_checkpoint(self.folder / f"{done:09d}")
            for at in sorted(self.folder.glob("*"))[:-GENERATIONS]:
                shutil.rmtree(at, ignore_errors=True)
        except OSError as error:
            _log.warning("checkpoint not saved, the one before stays: %s", error)
        self._last = time.monotonic()
