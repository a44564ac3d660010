"""Checkpoints within a phase, two generations of them, and resuming from the newest complete one.

A generation is a folder `<batches>/` with `state.ckpt` and a manifest of its checksums, which is
written last: what a kill, a full disk or a flipped bit leaves behind is not a checkpoint.
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
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from vitrim.data.loader import ResumableLoader, seed_all
from vitrim.errors import ConfigError, VitrimError
from vitrim.files import StoreError, verify, write, write_manifest
from vitrim.jobs import signals
from vitrim.trainer.phase import ResumePoint

_log = logging.getLogger(__name__)
STATE = "state.ckpt"
GENERATIONS = 2
LOOK_EVERY, AGREE_EVERY = 50, 10
"""Batches between two looks at whether a loss diverged, which wait for the device; and between two
messages among processes about requests to stop."""


class DivergedError(VitrimError):
    """A loss that is not finite: the last checkpoint is from before."""


class SafeCheckpointIO(CheckpointIO):
    """Write a checkpoint into a folder so that it is complete or absent."""

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: object = None,
    ) -> None:
        """Write, flush, read back, and write the checksums.

        Raises:
            OSError: the disk is full or broken; nothing is left of the attempt.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / STATE, lambda temporary: _dump(checkpoint, temporary))
            write_manifest(folder, (STATE,))
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
            StoreError: an address instead of a folder of this machine, or a damaged checkpoint.
        """
        if "://" in str(path):
            raise StoreError(f"{path}: checkpoints are read from folders, not from addresses")
        verify(Path(path), (STATE,))
        checkpoint: dict[str, Any] = torch.load(
            Path(path) / STATE, map_location=map_location, weights_only=True
        )
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint's folder."""
        shutil.rmtree(path, ignore_errors=True)


def _dump(checkpoint: Mapping[str, object], path: Path) -> None:
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:  # so torch reports a full disk
        raise OSError(str(error)) from None
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise OSError(f"{path}: {broken} reads back differently from what was written")


def newest(folder: Path) -> Path | None:
    """Return the newest complete generation in `folder`, or None; remove what is incomplete.

    The caller holds the lock: a file that is being written would be removed as well.
    """
    empty = (generation for generation in folder.glob("*") if not any(generation.iterdir()))
    for stale in (*folder.glob("*/.*"), *empty):
        _log.info("%s: left by a run that was killed, removed", stale)
        stale.rmdir() if stale.is_dir() else stale.unlink()
    for generation in sorted(folder.glob("*"), key=lambda path: path.name, reverse=True):
        try:
            verify(generation, (STATE,))
        except StoreError as error:
            _log.warning("%s; resuming from an older checkpoint, or from the start", error)
            shutil.rmtree(generation)
        else:
            return generation
    return None


def _stop() -> NoReturn:
    """Raise Preempted for the signal that came, or for the one that another process was sent."""
    raise signals.Preempted(signals.received() or signal.SIGTERM)


def size_buffers(phase: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give empty buffers, whose size depends on the data, the size that they have in `state`."""
    for name, buffer in [*phase.named_buffers()]:
        if not buffer.numel() and name in state:
            owner, _, last = name.rpartition(".")
            phase.get_submodule(owner).register_buffer(last, torch.empty_like(state[name]))


def _split(trainer: Trainer) -> dict[str, int | str]:
    """Return how batches are split: a phase resumes exactly only if that is as before."""
    loader = trainer.train_dataloader
    batches = loader.batches if isinstance(loader, ResumableLoader) else None
    return {
        "processes": trainer.world_size,
        "batch_size": 0 if batches is None else batches.batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "device": trainer.strategy.root_device.type,
    }


def _drawn_step(trainer: Trainer) -> tuple[int, int]:
    """Return the number of the step, from 1 on, and of the process whose draws this step has.

    Where the loader draws another epoch, these are those of one process alone in that epoch.
    """
    done, loader = trainer.fit_loop.epoch_loop.batch_progress.total.ready, trainer.train_dataloader
    drawn = loader.batches.drawn_epoch if isinstance(loader, ResumableLoader) else None
    if drawn is None:
        return done, trainer.global_rank
    return done + (drawn - trainer.current_epoch) * int(trainer.num_training_batches), 0


def _any(*facts: bool) -> list[bool]:
    """Return which facts are true in any process; the message does not wait for devices."""
    shared = torch.tensor(facts, dtype=torch.int32)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return [bool(fact) for fact in shared.tolist()]


def _listed(split: Mapping[str, int | str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in split.items())


class Resume(Checkpoint):
    """Seed every step, save every `minutes` and on a request to stop, stop when a loss diverges.

    What a step draws depends only on `seed` and its number.

    Args:
        folder: of the checkpoints; None: nothing is saved.
        seed: of the phase.
        minutes: between two checkpoints; None: none is saved but on a request to stop.
        resumes_at: where the phase may resume (`vitrim.trainer.phase`): it is saved after any
            batch, only at the end of an epoch, or never, and then starts over when it was stopped.
    """

    def __init__(
        self, folder: Path | None, *, seed: int, minutes: float | None, resumes_at: ResumePoint
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.minutes = minutes
        self.resumes_at = resumes_at
        self._last = time.monotonic()
        self._due = self._stopping = False
        self._position: dict[str, int] | None = None
        self._split: dict[str, int | str] = {}
        self._diverged: Tensor | None = None  # epoch and batch, below 0: all losses were finite

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning, and let the loader resume as well.

        Raises:
            ConfigError: the checkpoint is of a run that split its batches differently.
        """
        signals.install()
        self._last = time.monotonic()
        if self._split not in ({}, _split(trainer)):
            raise ConfigError(
                f"{self.folder}: a checkpoint of a run with {_listed(self._split)}, and this one "
                f"has {_listed(_split(trainer))}: its result would not be that of an uninterrupted "
                "run; resume it as it was started, or remove that folder to start the phase over"
            )
        if self._position is not None:
            trainer.train_dataloader.load_state_dict(self._position)  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, object]:
        """Return the position of the loader, and how its batches are split."""
        return {"place": self._position, "split": self._split}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Remember the position of the loader, and how its batches are split."""
        self._position = state_dict["place"]
        self._split = state_dict.get("split", {})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Stop, now that the step before is logged; seed batches that no data module mixes."""
        if self._stopping:
            _stop()
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            seed_all(self.seed, *_drawn_step(trainer))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save where it is due; at an epoch's last batch only after what ends the epoch.

        Raises:
            DivergedError: a loss was not finite; noticed before anything is saved, and after
                `LOOK_EVERY` batches at the latest.
        """
        self._note(trainer, outputs, batch_idx)
        diverged, stopping, due = self._agreed(trainer)
        if diverged:
            at = -1 if self._diverged is None else int(self._diverged)
            where = f"in epoch {at >> 32}, batch {at % 2**32}" if at >= 0 else "in another process"
            raise DivergedError(
                f"{type(pl_module).__name__}: the loss is not finite {where}: lower the learning "
                "rate, clip (clip_norm), or look at the images; the last checkpoint is from before"
            )
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not is_last:
            return  # checkpoints have no gradients
        self._stopping = stopping
        if is_last:
            self._due = (stopping or due) and self.resumes_at != "never"
        elif (stopping or due) and self.resumes_at == "batch":
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due when the last batch ended."""
        if self._due:
            self._save(trainer)
            self._due = False
        if self._stopping:
            _stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning."""
        signals.install()

    def on_validation_batch_end(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        """Stop an evaluation that can be repeated; one within training is finished first."""
        if not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            signals.raise_if_stopped()

    def _note(self, trainer: Trainer, outputs: STEP_OUTPUT, batch_idx: int) -> None:
        """Note on the device, without waiting for it, where a loss was not finite first."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        if self._diverged is None:
            self._diverged = torch.full((), -1, dtype=torch.int64, device=loss.device)
        now = trainer.current_epoch << 32 | batch_idx
        is_first = ~loss.detach().isfinite().all() & (self._diverged < 0)
        self._diverged = torch.where(is_first, now, self._diverged)

    def _agreed(self, trainer: Trainer) -> tuple[bool, bool, bool]:
        """Return what any process has noticed: a loss that diverged, a signal, time to save."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        waited = time.monotonic() - self._last
        late = self.minutes is not None and waited >= 60 * self.minutes
        stopping, due = signals.received() is not None, late and trainer.is_global_zero
        if trainer.world_size > 1:
            if progress.total.ready % AGREE_EVERY and not progress.is_last_batch:
                return False, False, False
            stopping, due = _any(stopping, due)
        look = stopping or due or progress.is_last_batch or not progress.total.ready % LOOK_EVERY
        if not look:
            return False, False, False
        diverged = self._diverged is not None and int(self._diverged) >= 0
        if trainer.world_size > 1:
            (diverged,) = _any(diverged)
        return diverged, stopping, due

    def _save(self, trainer: Trainer) -> None:
        """Save a generation and remove all but the newest; warn of a full disk and continue."""
        if self.folder is None:
            return
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._position = trainer.train_dataloader.state_dict()  # type: ignore[union-attr]
        self._split = _split(trainer)
        try:
            trainer.save_checkpoint(self.folder / f"{done:09d}")
            for generation in sorted(self.folder.glob("*"))[:-GENERATIONS]:
                shutil.rmtree(generation, ignore_errors=True)
        except OSError as error:
            _log.warning("checkpoint not saved, the one before remains: %s", error)
        self._last = time.monotonic()
