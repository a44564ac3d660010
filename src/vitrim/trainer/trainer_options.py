"""Options of the Trainer of a phase: those of the run, and what the phase makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

from lightning import Callback, Trainer

from vitrim.trainer.classify import Classify
from vitrim.trainer.phase import Phase, Validated

VALIDATION_EPOCHS = 10
"""Epochs of training with labels between two validations, where the trainer does not say."""


def options_of(make: Callable[..., Trainer]) -> Mapping[str, object]:
    """Return the options of the trainers that `make` makes, where they are known."""
    return make.keywords if isinstance(make, partial) else {}


def callbacks_of(options: Mapping[str, object]) -> Sequence[Callback]:
    """Return copies of the callbacks among the options: each phase has its own."""
    return copy.deepcopy(cast(Sequence[Callback], options.get("callbacks") or []))


def limits(options: Mapping[str, object], batches: int) -> dict[str, object]:
    """Return the limit of one batch, where the share of `batches` that is asked for is none."""
    share = options.get("limit_train_batches", 1.0)
    none = isinstance(share, float) and int(batches * share) < 1
    return {"limit_train_batches": 1} if none else {}


def epochs_between_validations(options: Mapping[str, object], phase: Phase) -> int:
    """Return after how many epochs a phase is validated; 0: it is not.

    Where the options do not say, only training with labels is validated.
    """
    if options.get("limit_val_batches") == 0 or not isinstance(phase, Validated):
        return 0
    asked = options.get("check_val_every_n_epoch")
    by_default = VALIDATION_EPOCHS if isinstance(phase, Classify) else 0
    return by_default if asked is None else int(str(asked))
