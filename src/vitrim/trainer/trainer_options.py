"""Options of the Trainer of a phase: those of the run, and what the phase makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

from lightning import Callback, LightningModule, Trainer

from vitrim.errors import ConfigError
from vitrim.trainer.classify import Classify
from vitrim.trainer.kept_weights import KeptWeights
from vitrim.trainer.phase import Phase, Steps, Validated
from vitrim.trainer.recipe import Recipe

VALIDATION_EPOCHS = 10
"""Epochs between two validations of the phases that always have some, unless the trainer says."""


def options_of(make: Callable[..., Trainer]) -> Mapping[str, object]:
    """Return the options of the trainers that `make` makes, where they are known."""
    return make.keywords if isinstance(make, partial) else {}


def callbacks_of(options: Mapping[str, object]) -> Sequence[Callback]:
    """Return copies of the callbacks among the options: each phase has its own."""
    return copy.deepcopy(cast(Sequence[Callback], options.get("callbacks") or []))


def options_for(
    phase: Phase, options: Mapping[str, object], *, epochs: int, validated_every: int
) -> dict[str, object]:
    """Return the options of a Trainer that depend on the phase.

    Args:
        phase: that is to be run.
        options: of the run.
        epochs: of the phase; 0: it is not trained.
        validated_every: epochs between two validations; 0: there are none.

    Raises:
        ConfigError: the phase takes its steps by itself, and batches are to be accumulated.
    """
    by_itself = not phase.automatic_optimization  # type: ignore[attr-defined]
    number = options.get("accumulate_grad_batches", 1)
    if epochs and number != 1 and isinstance(phase, Steps) and phase.own_steps:
        raise ConfigError(not_accumulated(type(phase).__name__, number))
    return {
        "max_epochs": epochs,
        "check_val_every_n_epoch": validated_every or 1,
        **({} if validated_every else {"limit_val_batches": 0}),
        "gradient_clip_val": phase.clip_norm or None,
        **({"accumulate_grad_batches": 1} if by_itself else {}),  # no optimiser of Lightning's
    }


def not_accumulated(phase: str, number: object) -> str:
    """Return why gradients cannot be accumulated."""
    return (
        f"trainer.accumulate_grad_batches={number}: {phase} takes a step after every batch: set 1, "
        "and a larger data.batch_size"
    )


def limits(options: Mapping[str, object], batches: int) -> dict[str, object]:
    """Return the limit of one batch, where the share of `batches` that is asked for is none."""
    share = options.get("limit_train_batches", 1.0)
    none = isinstance(share, float) and int(batches * share) < 1
    return {"limit_train_batches": 1} if none else {}


def epochs_between_validations(options: Mapping[str, object], phase: Phase) -> int:
    """Return after how many epochs a phase is validated; 0: it is not.

    Where the options do not say, only training with labels is validated, and what keeps the best
    weights.
    """
    if options.get("limit_val_batches") == 0 or not isinstance(phase, Validated):
        return 0
    asked = options.get("check_val_every_n_epoch")
    always = isinstance(phase, Classify) or _keeps_best(phase)
    by_default = VALIDATION_EPOCHS if always else 0
    return by_default if asked is None else int(str(asked))


def recipe_of(phase: object) -> Recipe | None:
    """Return the recipe that a phase trains by, if it has one and leaves the rest to the runner."""
    recipe = getattr(phase, "recipe", None)
    return recipe if isinstance(recipe, Recipe) else None


def keeping(phase: LightningModule, *, epochs: int, validated_every: int) -> list[KeptWeights]:
    """Return what keeps the average or the best of the weights, if the recipe of a phase says so.

    Args:
        phase: that is trained.
        epochs: of it; 0: nothing is trained.
        validated_every: epochs between two validations; 0: there are none.

    Raises:
        ConfigError: the best weights are to be kept, and there is nothing to choose from.
    """
    recipe = recipe_of(phase)
    if recipe is None or not epochs or not (recipe.ema_decay or recipe.keep == "best"):
        return []
    if recipe.keep == "last":
        return [KeptWeights(phase, recipe.ema_decay)]
    if not isinstance(phase, Validated) or not 0 < validated_every <= epochs:
        raise ConfigError(nothing_to_choose(type(phase).__name__, validated_every, epochs))
    return [KeptWeights(phase, recipe.ema_decay, phase.best_by)]


def nothing_to_choose(where: str, validated_every: int, epochs: int) -> str:
    """Return why the best weights of a training cannot be kept.

    >>> nothing_to_choose("method.tuning", 10, 3)[:58]
    'method.tuning: keep=best has nothing to choose from: there'
    """
    found = (
        f"there is a validation every {validated_every} epochs, and epochs={epochs}: set "
        "trainer.check_val_every_n_epoch=1"
        if validated_every
        else "it is not validated: it needs validation images"
    )
    return f"{where}: keep=best has nothing to choose from: {found}, or keep=last"


def keeping_best(settings: object, key: str = "") -> Iterator[tuple[str, int]]:
    """Iterate over dotted key and epochs of the trainings that keep their best weights."""
    if not isinstance(settings, dict):
        return
    if settings.get("keep") == "best":
        yield key, settings.get("epochs", 0)
    for name, child in settings.items():
        yield from keeping_best(child, f"{key}.{name}" if key else str(name))


def _keeps_best(phase: object) -> bool:
    recipe = recipe_of(phase)
    return recipe is not None and recipe.keep == "best"
