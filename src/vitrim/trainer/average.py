"""A moving average of the weights while a phase trains: what remains of it at the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning import Callback, LightningModule, Trainer

from vitrim.trainer.kept_states import KeptStates


class WeightAverage(Callback):
    """Average the trained weights of a phase after every step, and end with the average.

    Validation during training is of the average as well.

    Args:
        phase: whose weights are averaged.
        decay: of the average, per step (`KeptStates`).
    """

    def __init__(self, phase: LightningModule, decay: float) -> None:
        self._states = KeptStates(phase, decay=decay)
        self._steps = 0
        self._in_place = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights before training, or continue."""
        self._states.start()
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        """Move the average where the batch ended with a step of the optimiser."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._states.move_average(self._steps)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the average."""
        self._in_place.enter_context(self._states.averaged())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the weights."""
        self._in_place.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in place of the weights."""
        self._states.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return self._states.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with the average of a checkpoint."""
        self._states.load_state_dict(state_dict)
