"""From losses and costs to what goes: nested paths of removals, and the best of them in a budget.

A path starts with nothing removed and removes one step after another, those first that lose least
for what they save (of several budgets, for a weighted sum of what they save). Its plan for a budget
is its first state within it, so that a larger budget never predicts a larger loss, and the plan
ends less than one step below its budget. Some choices are no steps: whether a branch is dropped, a
head removed, a layer factorised or in int8. They are made for a whole path, as a price on what is
saved makes them; of the paths of all prices, the one that predicts the least loss is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


class Steps(NamedTuple):
    """The removals of one site or layer, in their order.

    `losses` (n,) rise; `savings` (n, budgets) are what each removal gives back.
    """

    name: str
    losses: Floats
    savings: Floats


class Path(NamedTuple):
    """A start, and all steps from there.

    `loss` and `remaining` (budgets,) are those of the start.
    """

    loss: float
    remaining: Floats
    steps: Sequence[Steps]


class Found(NamedTuple):
    """How many removals of each site a plan has, its loss, and what remains, (budgets,)."""

    counts: dict[str, int]
    loss: float
    remaining: Floats


def first_within(path: Path, limits: Floats, weights: Floats) -> Found | None:
    """Return the first state of a path within all limits; None where there is none.

    Args:
        path: the start and the steps.
        limits: what may remain, (budgets,).
        weights: of what is saved, (budgets,).
    """
    names = [steps.name for steps in path.steps]
    losses = np.concatenate([steps.losses for steps in path.steps] or [np.zeros(0)])
    savings = np.concatenate([s.savings for s in path.steps] or [np.zeros((0, len(limits)))])
    owner = np.repeat(np.arange(len(names)), [len(steps.losses) for steps in path.steps])
    order = np.argsort(losses / np.maximum(savings @ weights, 1e-300), kind="stable")
    remaining = path.remaining - np.cumsum(savings[order], axis=0)
    states = np.concatenate([path.remaining[None], remaining])
    fits = (states <= limits + 1e-6).all(1)
    if not fits.any():
        return None
    n = int(fits.argmax())
    counts = np.bincount(owner[order[:n]], minlength=len(names))
    return Found(
        counts={name: int(count) for name, count in zip(names, counts, strict=True)},
        loss=path.loss + float(losses[order[:n]].sum()),
        remaining=states[n],
    )


def best_within(steps: Steps, prices: Floats) -> Floats:
    """Return the least loss minus the price of what is saved, (prices,).

    Args:
        steps: of one site.
        prices: of what is saved, (prices, budgets).
    """
    losses = np.concatenate([[0.0], np.cumsum(steps.losses)])
    saved = np.concatenate([np.zeros((1, prices.shape[1])), np.cumsum(steps.savings, axis=0)])
    best: Floats = (losses - prices @ saved.T).min(1)
    return best
