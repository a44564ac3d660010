"""Run one phase with a Trainer of its own, or load its finished result from disk."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safetensors.torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitrim.data import Loaders
from vitrim.errors import is_count, is_rate
from vitrim.files import StoreError, digest, verify, write, write_manifest
from vitrim.jobs import distributed, signals
from vitrim.jobs.lock import lock
from vitrim.network.computing import computing_on
from vitrim.store import mismatches, read_tensors
from vitrim.trainer.batchnorm import estimate_batchnorm
from vitrim.trainer.classify import validate
from vitrim.trainer.compilation import compiling
from vitrim.trainer.ddp import strategy_for
from vitrim.trainer.phase import Phase, check_phase
from vitrim.trainer.phase_images import kept_on, training_batches, validation_batches
from vitrim.trainer.progress import Bar, Speed
from vitrim.trainer.resume import Resume, SafeCheckpointIO, newest, size_buffers
from vitrim.trainer.tracking import Tracker
from vitrim.trainer.trainer_options import (
    callbacks_of,
    epochs_between_validations,
    keeping,
    limits,
    options_for,
    options_of,
    recipe_of,
)

_log = logging.getLogger(__name__)
_STATE = "state.safetensors"
LAST = "last.safetensors"
"""The state after the last epoch, beside the best one, of phases that keep the best."""
_LARGE = 100_000_000  # bytes of a phase's state
_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_EXPECTED: tuple[tuple[str, type[Warning]], ...] = (
    (".*does not have many workers.*", Warning),  # data.workers is a choice
    (".*no `validation_step`.*", Warning),  # scorers have none
    (".*have no `val_dataloader`.*", Warning),  # validation is a choice
    (".*configure_optimizers` returned `None`.*", Warning),  # nor optimisers
    (".*find_unused_parameters=True was specified.*", Warning),
    (".*smaller than the logging interval.*", Warning),  # steps are counted over epochs
    (".*grad attribute of a Tensor that is not a leaf.*", Warning),  # torch.compile looks there
    (".*LeafSpec.*", FutureWarning),  # lightning 2.6 on torch 2.14
    (".*`srun` command is available.*", Warning),  # a run may be outside SLURM
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips and device lists, and its warnings about what is meant here."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message, category in _EXPECTED:
            warnings.filterwarnings("ignore", message, category)
        for logger in loggers:
            logger.setLevel(max(logger.level, logging.WARNING))
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRunner:
    """Runs the phases of one run, each with a Trainer of its own.

    Args:
        trainer: makes a new Trainer.
        data: where the images of all phases come from.
        tracker: records their metrics.
        folder: of the run.
        shared: the folder of results that several runs use.
        seed: of the run.
        progress: whether progress bars are shown.
        checkpoint_minutes: between two checkpoints within a phase; None: neither they nor the final
            states of phases are kept, because `folder` does not outlive the run.
        batchnorm_images: that estimate the statistics of folded BatchNorms before training.
        evaluates: whether networks are evaluated.
        compiles: whether training steps are compiled (`Compiled`).
    """

    trainer: Callable[..., Trainer]
    data: Loaders
    tracker: Tracker
    folder: Path
    shared: Path
    seed: int
    progress: bool
    checkpoint_minutes: float | None
    batchnorm_images: int
    evaluates: bool = True
    compiles: bool = False

    def run_or_load(
        self,
        folder: Path,
        phase: Phase,
        *,
        name: str,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Run `phase` and save its final state in `folder`, or load the state saved there.

        A stopped phase resumes from its last checkpoint, if it has one (`Resume`), with the same
        result as without the stop. In both cases the callbacks' `on_fit_end` runs, on the finished
        phase. Its random numbers depend only on the seed and `name`.

        Raises:
            ConfigError: the phase does not follow its protocol (`check_phase`).
        """
        check_phase(phase)
        assert isinstance(phase, LightningModule)
        if sum(tensor.nbytes for tensor in phase.state_dict().values()) > _LARGE:
            gc.collect()  # an earlier phase and its Trainer refer to each other
        signals.raise_if_stopped()
        with lock(folder):
            if distributed.broadcast((folder / "manifest.json").is_file()):
                _log.info("%s: finished before, loaded from %s", name, folder)
                _restore(folder, phase)
                self._fit(name, phase, epochs=0, callbacks=callbacks, checkpoints=None)
                return
            checkpoints = folder / "checkpoints"
            _log.info("%s: %d epochs", name, phase.epochs)
            last = self._fit(
                name, phase, epochs=phase.epochs, callbacks=callbacks, checkpoints=checkpoints
            )
            if distributed.is_main_process() and self.checkpoint_minutes is not None:
                states = dict(zip((_STATE, LAST), [phase.state_dict(), *last], strict=False))
                for file, state in states.items():
                    _write_state(folder / file, state)
                write_manifest(folder, tuple(states), name=name, epochs=phase.epochs)
                shutil.rmtree(checkpoints, ignore_errors=True)

    def _fit(
        self,
        name: str,
        phase: Phase,
        *,
        epochs: int,
        callbacks: Sequence[Callback],
        checkpoints: Path | None,
    ) -> list[Mapping[str, Tensor]]:
        """Train `phase` until `epochs` are done, from its newest checkpoint if there is one.

        Return the state after the last epoch, if it is not the result.
        """
        assert isinstance(phase, LightningModule)
        seed = int(digest([self.seed, name]), 16)
        seed_everything(seed, workers=True, verbose=False)
        self.data.seed = seed
        self.tracker.phase = name
        resume = Resume(
            checkpoints, seed=seed, minutes=self.checkpoint_minutes, resumes_at=phase.resumes_at
        )
        recipe = recipe_of(phase)
        repeats = 1 if recipe is None else recipe.repeats
        loader = training_batches(phase, self.data, seed=self.seed, repeats=repeats)
        options = options_of(self.trainer)
        validates = epochs > 0 and self.evaluates
        between = epochs_between_validations(options, phase) if validates else 0
        kept = keeping(phase, epochs=epochs, validated_every=between)
        with quiet_lightning():
            speed = Speed(self.tracker)
            trainer = self._trainer(
                *([Bar(name, speed)] if self.progress else []),
                *([speed] if epochs else []),
                resume,
                *kept,
                *(compiling(phase) if self.compiles and epochs else []),
                *callbacks,
                logger=self.tracker,
                **options_for(phase, options, epochs=epochs, validated_every=between),
                **strategy_for(phase, options.get("strategy"), epochs=epochs, image=self._image),
                **({} if loader is None else limits(options, len(loader))),
            )
            if epochs and phase.trains:
                estimate_batchnorm(phase.net, lambda: self._calibration(self.batchnorm_images))
            phase.train()
            validates = loader is not None and between > 0
            device = trainer.strategy.root_device
            with kept_on(device, loader), computing_on(device):
                trainer.fit(
                    phase,
                    loader,
                    validation_batches(self.data, trainer) if validates else None,
                    datamodule=self.data if loader is None else None,
                    ckpt_path=_newest(checkpoints),
                    weights_only=True,
                )
        return [each.last for each in kept if each.last is not None]

    def _calibration(self, images: int) -> DataLoader[object]:
        """Return batches of that many training images, plain and in order."""
        return self.data.calibration_dataloader(images, self.seed)

    def _image(self) -> Tensor:
        """Return a batch of one training image."""
        return next(self.calibration_images(1))

    def calibration_images(self, images: int) -> Iterator[Tensor]:
        """Iterate over batches (B, C, H, W) of that many training images, plain and in order."""
        for batch in cast(Iterable[Sequence[Tensor]], self._calibration(images)):
            yield batch[0]

    def evaluate(self, folder: Path, net: nn.Module, n_classes: int) -> dict[str, float] | None:
        """Return the `accuracy` of `net`, which is saved in `folder` and computed only once."""
        if not self.evaluates:
            return None
        known = folder / "accuracy.json"
        with lock(folder):
            main = distributed.is_main_process()
            accuracy = distributed.broadcast(_known_accuracy(known) if main else None)
            if accuracy is None:
                accuracy = distributed.broadcast(self.accuracy(net, n_classes))
                if main:
                    text = json.dumps(accuracy)
                    write(known, lambda path: path.write_text(text))
        return accuracy

    def accuracy(self, net: nn.Module, n_classes: int) -> dict[str, float] | None:
        """Return top-1 and top-5 of `net` in percent, and the number of `images` evaluated.

        None where networks are not evaluated.
        """
        if not self.evaluates:
            return None
        signals.raise_if_stopped()
        resume = Resume(None, seed=self.seed, minutes=self.checkpoint_minutes, resumes_at="never")
        with quiet_lightning():
            trainer = self._trainer(
                *([Bar("", None)] if self.progress else []), resume, logger=False
            )
            return validate(net, trainer, self.data, n_classes=n_classes)

    def _trainer(self, *callbacks: Callback, **options: object) -> Trainer:
        own = callbacks_of(options_of(self.trainer))
        return self.trainer(
            default_root_dir=self.folder,
            callbacks=[*callbacks, *own],
            enable_progress_bar=self.progress,
            enable_checkpointing=True,
            use_distributed_sampler=False,  # the loaders know their share
            plugins=[SafeCheckpointIO(), distributed.cluster_environment()],
            **{"check_val_every_n_epoch": 1, **options},
        )


def _known_accuracy(path: Path) -> dict[str, float] | None:
    """Return the accuracy in a file, or None where there is none, or something else."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text())
        known = content if isinstance(content, dict) else {}
        names = ("top1", "top5")
        values = {name: v for name in names if is_rate(v := known.get(name)) and v <= 100}
        images = known.get("images")
        if len(values) == len(names) and (images is None or is_count(images)):
            return values if images is None else {**values, "images": images}
        _log.warning("%s: no accuracy, evaluated again", path)
    return None


def _newest(checkpoints: Path | None) -> Path | None:
    """Return the newest checkpoint, as the main process finds it."""
    if checkpoints is None:
        return None
    checkpoint: Path | None = distributed.broadcast(
        newest(checkpoints) if distributed.is_main_process() else None
    )
    return checkpoint


def _write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write the tensors of a phase."""
    on_cpu = {key: value.cpu().contiguous() for key, value in state.items()}
    write(path, lambda temporary: safetensors.torch.save_file(on_cpu, temporary))


def _restore(folder: Path, phase: nn.Module) -> None:
    """Load the final state of a phase."""
    verify(folder, (_STATE,))
    state = read_tensors(folder / _STATE)
    size_buffers(phase, state)
    problems = mismatches(phase, state)
    if problems:
        raise StoreError(f"{folder / _STATE} does not fit: {'; '.join(problems[:3])}")
    phase.load_state_dict(state)
