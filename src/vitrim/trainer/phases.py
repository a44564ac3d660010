"""Run one phase with a Trainer of its own, or take its finished result from disk."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn

from vitrim.data import Loaders
from vitrim.files import StoreError, digest, seal, verify, write
from vitrim.jobs import distributed, signals
from vitrim.jobs.lock import lock
from vitrim.store import misfits, read_tensors
from vitrim.trainer.batchnorm import count
from vitrim.trainer.classify import judge
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.resume import Resume, SafeCheckpointIO, newest, size_buffers
from vitrim.trainer.tracking import Tracker

_log = logging.getLogger(__name__)
for _chatty in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)  # its tips and device lists, per phase
warnings.filterwarnings("ignore", ".*does not have many workers.*")  # data.workers is a choice
warnings.filterwarnings("ignore", ".*no `validation_step`.*")  # scorers have none
warnings.filterwarnings("ignore", ".*configure_optimizers` returned `None`.*")  # nor optimisers
warnings.filterwarnings("ignore", ".*find_unused_parameters=True was specified.*")
warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # lightning 2.6 on torch 2.14
warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # a run may be outside SLURM
_STATE = "state.safetensors"
_COUNTED = 512
"""Images that norms count which never did."""


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
    checkpoint_minutes: float

    def once(
        self,
        folder: Path,
        phase: LightningModule,
        *,
        name: str,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Train `phase`, or load its finished state from `folder`, where it is kept.

        A phase that was stopped goes on from its last checkpoint, if it has any (`Resume`), exactly
        as if it had not been. Either way the callbacks' `on_fit_end` runs, on the trained phase.
        Its randomness depends on the seed and `name` alone.
        """
        signals.check()
        with lock(folder):
            if distributed.agreed((folder / "manifest.json").is_file()):
                _log.info("%s: finished before, taken from %s", name, folder)
                _restore(folder, phase)
                self._fit(name, phase, epochs=0, callbacks=callbacks, folder=None)
                return
            checkpoints = folder / "checkpoints"
            self._fit(
                name,
                phase,
                epochs=phase.epochs,  # type: ignore[arg-type]
                callbacks=callbacks,
                folder=checkpoints,
            )
            if distributed.first():
                state = {key: value.cpu().contiguous() for key, value in phase.state_dict().items()}
                write(folder / _STATE, lambda path: safetensors.torch.save_file(state, path))
                seal(folder, (_STATE,), name=name, epochs=phase.epochs)
                shutil.rmtree(checkpoints, ignore_errors=True)

    def _fit(
        self,
        name: str,
        phase: LightningModule,
        *,
        epochs: int,
        callbacks: Sequence[Callback],
        folder: Path | None,
    ) -> None:
        """Train `phase` for `epochs`, from the newest checkpoint in `folder` on."""
        seed = int(digest([self.seed, name]), 16)
        seed_everything(seed, workers=True, verbose=False)
        self.data.seed = seed
        self.tracker.phase = name
        recipe: Recipe | None = getattr(phase, "recipe", None)
        resume = Resume(folder, seed=seed, minutes=self.checkpoint_minutes)
        trainer = self._trainer(
            resume,
            *callbacks,
            max_epochs=epochs,
            logger=self.tracker,
            gradient_clip_val=(recipe.clip_norm or None) if recipe else None,
        )
        if epochs and (recipe or hasattr(phase, "recipe_of_trials")):
            count(phase.net, lambda: self.data.calibration_dataloader(_COUNTED, self.seed))  # type: ignore[arg-type]
        phase.train()
        samples: int | None = getattr(phase, "samples", None)
        trainer.fit(
            phase,
            None if samples is None else self.data.calibration_dataloader(samples, self.seed),
            datamodule=self.data if samples is None else None,
            ckpt_path=folder
            and distributed.agreed(newest(folder) if distributed.first() else None),
            weights_only=True,
        )

    def judged(self, folder: Path, net: nn.Module, n_classes: int) -> dict[str, float]:
        """Return the `accuracy` of `net`, or what is known of it in `folder`."""
        known = folder / "accuracy.json"
        with lock(folder):
            if not distributed.agreed(known.is_file()):
                text = json.dumps(self.accuracy(net, n_classes))
                if distributed.first():
                    write(known, lambda path: path.write_text(text))
            accuracy: dict[str, float] = distributed.agreed(
                json.loads(known.read_text()) if distributed.first() else None
            )
        return accuracy

    def accuracy(self, net: nn.Module, n_classes: int) -> dict[str, float]:
        """Return top-1 and top-5 of `net` in percent over the whole validation set."""
        signals.check()
        resume = Resume(None, seed=self.seed, minutes=self.checkpoint_minutes)
        return judge(net, self._trainer(resume, logger=False), self.data, n_classes=n_classes)

    def _trainer(self, *callbacks: Callback, **options: Any) -> Trainer:
        several: dict[str, Any] = getattr(self.trainer, "keywords", {})
        if several.get("strategy") == "ddp":  # the classifier, say, learns nothing from features
            options["strategy"] = "ddp_find_unused_parameters_true"
        return self.trainer(
            default_root_dir=self.folder,
            callbacks=[*([RichProgressBar(leave=False)] if self.progress else []), *callbacks],
            enable_progress_bar=self.progress,
            enable_checkpointing=True,
            use_distributed_sampler=False,  # the loaders know their share
            plugins=[SafeCheckpointIO(), distributed.environment()],
            **options,
        )


def _restore(folder: Path, phase: LightningModule) -> None:
    verify(folder, (_STATE,))
    state = read_tensors(folder / _STATE)
    size_buffers(phase, state)
    problems = misfits(phase, state)
    if problems:
        raise StoreError(f"{folder / _STATE} does not fit: {'; '.join(problems[:3])}")
    phase.load_state_dict(state)
