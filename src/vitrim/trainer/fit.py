"""Run one phase with a Trainer of its own, or take its finished result from disk."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn

from vitrim.data import Loaders
from vitrim.store import StoreError, misfits, read_tensors, seal, verify, write
from vitrim.trainer.classify import Classify
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.tracking import Tracker

_log = logging.getLogger(__name__)
for _chatty in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)  # its tips and device lists, per phase
warnings.filterwarnings("ignore", ".*does not have many workers.*")  # data.workers is a choice
warnings.filterwarnings("ignore", ".*no `validation_step`.*")  # scorers have none
warnings.filterwarnings("ignore", ".*configure_optimizers` returned `None`.*")  # nor optimisers
warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # lightning 2.6 on torch 2.14
_STATE = "state.safetensors"


def digest(value: Any) -> str:
    """Return eight hex digits that identify a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def lock(folder: Path) -> AbstractContextManager[Any]:
    """Return the lock of a folder, made if missing: one process at a time works in it."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock")


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """What every phase of one run shares.

    `trainer` makes a new Trainer; `shared` is the folder of results that several runs use.
    """

    trainer: Callable[..., Trainer]
    data: Loaders
    tracker: Tracker
    folder: Path
    shared: Path
    seed: int
    progress: bool

    def fit(
        self, name: str, phase: LightningModule, *, epochs: int, callbacks: Sequence[Callback] = ()
    ) -> None:
        """Train `phase` for `epochs`; its randomness depends on the seed and `name` alone."""
        seed_everything(int(digest([self.seed, name]), 16), workers=True, verbose=False)
        self.tracker.phase = name
        recipe: Recipe | None = getattr(phase, "recipe", None)
        trainer = self.trainer(
            max_epochs=epochs,
            logger=self.tracker,
            default_root_dir=self.folder,
            callbacks=[*_bars(progress=self.progress), *callbacks],
            enable_progress_bar=self.progress,
            gradient_clip_val=(recipe.clip_norm or None) if recipe else None,
        )
        phase.train()
        samples: int | None = getattr(phase, "samples", None)
        if samples is None:
            trainer.fit(phase, datamodule=self.data)
        else:
            trainer.fit(phase, self.data.calibration_dataloader(samples, self.seed))

    def once(
        self,
        name: str,
        key: str,
        phase: LightningModule,
        *,
        epochs: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Fit `phase`, or load its finished state from an earlier run with the same `key`.

        Either way the callbacks' `on_fit_end` runs, on the trained phase.
        """
        folder = self.shared / f"{name}-{key}"
        with lock(folder):
            if (folder / "manifest.json").is_file():
                _log.info("%s: finished before, taken from %s", name, folder)
                _restore(folder, phase)
                self.fit(name, phase, epochs=0, callbacks=callbacks)
                return
            self.fit(name, phase, epochs=epochs, callbacks=callbacks)
            state = {key: value.cpu().contiguous() for key, value in phase.state_dict().items()}
            write(folder / _STATE, lambda path: safetensors.torch.save_file(state, path))
            seal(folder, (_STATE,), name=name, epochs=epochs)

    def accuracy(self, net: nn.Module, n_classes: int) -> dict[str, float]:
        """Return top-1 and top-5 of `net` in percent over the whole validation set."""
        return accuracy(
            net,
            n_classes,
            trainer=self.trainer,
            data=self.data,
            folder=self.folder,
            progress=self.progress,
        )


def accuracy(
    net: nn.Module,
    n_classes: int,
    *,
    trainer: Callable[..., Trainer],
    data: Loaders,
    folder: Path,
    progress: bool,
) -> dict[str, float]:
    """Return top-1 and top-5 of `net` in percent over the whole validation set of `data`."""
    recipe = Recipe(epochs=0, lr=0.0, weight_decay=0.0, warmup_epochs=0.0, clip_norm=0.0)
    judge = trainer(
        logger=False,
        default_root_dir=folder,
        callbacks=_bars(progress=progress),
        enable_progress_bar=progress,
    )
    found: Sequence[Mapping[str, float]] = judge.validate(
        Classify(net, recipe=recipe, n_classes=n_classes), datamodule=data, verbose=False
    )
    return {name: found[0][name] for name in ("top1", "top5")}


def _bars(*, progress: bool) -> list[Callback]:
    return [RichProgressBar(leave=False)] if progress else []


def _restore(folder: Path, phase: LightningModule) -> None:
    verify(folder, (_STATE,))
    state = read_tensors(folder / _STATE)
    for name, buffer in [*phase.named_buffers()]:
        if not buffer.numel() and name in state:  # the data decided on its size
            owner, _, last = name.rpartition(".")
            phase.get_submodule(owner).register_buffer(last, torch.empty_like(state[name]))
    problems = misfits(phase, state)
    if problems:
        raise StoreError(f"{folder / _STATE} does not fit: {'; '.join(problems[:3])}")
    phase.load_state_dict(state)
