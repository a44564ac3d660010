"""What remains of the weights of a training: the last ones, their average, or the best ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from vitrim.trainer.kept_states import KeptStates

_log = logging.getLogger(__name__)


class KeptWeights(Callback):
    """Average the trained weights of a phase after every step, keep the best, or both.

    Validation during training is of the average, if there is one. The best weights, or averages,
    are those of the validation with the highest metric; of equal ones the first. The last epoch is
    validated as well. `last` has the state of the phase before it returned to the best.

    Args:
        phase: whose weights are kept.
        decay: of the average, per step (`KeptStates`); 0: there is none.
        best_by: the metric of validations; None: the last weights, or averages, remain.
    """

    last: Mapping[str, Tensor] | None = None

    def __init__(self, phase: LightningModule, decay: float, best_by: str | None = None) -> None:
        self._states = KeptStates(phase, decay=decay)
        self._best_by = best_by
        self._steps = 0
        self._in_place = ExitStack()
        self._has_ended = False

    @property
    def state_key(self) -> str:
        """Name in checkpoints: that of the class when it only averaged."""
        return "WeightAverage"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights before training, or continue."""
        self._states.start()
        self._steps = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        """Let the last epoch be validated."""
        if self._best_by is not None and trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        """Move the average where the batch ended with a step of the optimiser."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._states.move_average(self._steps)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the average."""
        self._in_place.enter_context(self._states.averaged())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was validated if it is the best; train on with the weights."""
        if self._best_by is not None and not trainer.sanity_checking:
            self._states.keep_if_best(-float(trainer.callback_metrics[self._best_by]))
        self._in_place.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights, or the average, in place of the last ones."""
        history = self._states.history
        if history:
            _log.info(
                "%s: %.2f %s in validation %d of %d, whose weights are kept; %.2f in the last",
                *(type(pl_module).__name__, -min(history), self._best_by),
                *(1 + history.index(min(history)), len(history), -history[-1]),
            )
            with self._states.averaged():
                state = pl_module.state_dict().items()
                self.last = {name: tensor.detach().cpu().clone() for name, tensor in state}
        self._states.restore()
        self._has_ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do so where a phase continued from after its last epoch: Lightning trains no more."""
        if not self._has_ended:
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the best weights and the average."""
        return self._states.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with those of a checkpoint."""
        self._states.load_state_dict(state_dict)
