"""Trials shared out among the processes of a run: a round is one trial in each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrim.data.loader import ResumableLoader
from vitrim.jobs import distributed
from vitrim.method.dcvit.trial_training import TrialState, TrialTraining
from vitrim.trainer.shares import own_state, states_of_all

SavedTrials = TrialState | None | list[TrialState | None]
"""The trial in training, or that of each process by its rank; None: there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """Process r of n trains the trials r, r + n, r + 2n, ..., each as one process alone would.

    In the last round some processes may have no trial. Every method that sends or gathers is called
    by all of them.

    Args:
        trials: how many there are.
        epochs: of each; 0: none is trained, and each process works out all of them.
        rank: of this process, from 0 on.
        processes: how many there are; 1: all trials are this one's.
    """

    trials: int
    epochs: int
    rank: int
    processes: int

    @classmethod
    def here(cls, trials: int, epochs: int) -> Rounds:
        """Return the share of this process."""
        rank, processes = distributed.place() if epochs else (0, 1)
        return cls(trials=trials, epochs=epochs, rank=rank, processes=processes)

    @property
    def shared(self) -> bool:
        """Whether other processes train some of the trials."""
        return self.processes > 1

    @property
    def n_epochs(self) -> int:
        """The epochs of the phase: one before all trials, and those of the rounds."""
        return 1 + -(-self.trials // self.processes) * self.epochs

    def at(self, epoch: int) -> tuple[int | None, int]:
        """Return which trial is trained in an epoch of the phase, and which epoch of its own it is.

        The trial is None in epoch 0, and where this process has none in the last round.

        >>> rounds = Rounds(trials=3, epochs=2, rank=1, processes=2)
        >>> [rounds.at(epoch) for epoch in range(rounds.n_epochs)]
        [(None, 0), (1, 0), (1, 1), (None, 0), (None, 1)]
        """
        if epoch == 0:
            return None, 0
        position, own = self._position(epoch)
        return position if position < self.trials else None, own

    def alone(self, epoch: int) -> int:
        """Return in which epoch one process alone does what this one does in `epoch`, from 0 on.

        >>> rounds = Rounds(trials=3, epochs=2, rank=0, processes=2)
        >>> [rounds.alone(epoch) for epoch in range(rounds.n_epochs)]
        [0, 1, 2, 5, 6]
        """
        position, own = self._position(epoch)
        return 1 + position * self.epochs + own if epoch else 0

    def place(self, loader: object, epoch: int) -> None:
        """Let a loader draw in this epoch of the phase what one process alone would draw."""
        if self.shared and isinstance(loader, ResumableLoader):
            loader.draw_as(self.alone(epoch))

    def tried(self, epoch: int) -> range:
        """Return the trials of all processes in an epoch of the phase, from 1 on."""
        first = self._position(epoch)[0] - self.rank
        return range(first, min(first + self.processes, self.trials))

    def _position(self, epoch: int) -> tuple[int, int]:
        number, own = divmod(epoch - 1, self.epochs)
        return number * self.processes + self.rank, own

    def sent(self, x: Tensor | None, position: int, device: torch.device) -> Tensor:
        """Return the tensor on `device` of the process that trained the trial at `position`.

        All processes call this; the others may pass None.
        """
        if not self.shared:
            assert x is not None
            return x
        return distributed.sent(x, source=position % self.processes, device=device)

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of x over the processes, all of which call this."""
        return distributed.summed(x) if self.shared else x

    def gathered(self, trial: TrialTraining | None) -> SavedTrials:
        """Return the state of the trial in training, of all processes if they share."""
        return states_of_all(None if trial is None else trial.state_dict(), self.processes)

    def own(self, saved: SavedTrials) -> TrialState | None:
        """Return this process's part of what `gathered` returned (`vitrim.trainer.shares`)."""
        return own_state(saved, self.rank, self.processes)
