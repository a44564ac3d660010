"""Training of one branch by itself, towards the dense stream, with images held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from vitrim.method.joint.settings import LocalTraining
from vitrim.trainer.kept_states import KeptStates

_PATIENCE = 2  # epochs without a better state


class Rows(NamedTuple):
    """Sampled tokens of images: the stream before the branch, and its target, (images, n, D).

    `inputs` are what is trained reads, `weights` (images, n) those of the squared errors.
    """

    before: Tensor
    inputs: Tensor
    target: Tensor
    weights: Tensor

    def flat(self, images: slice) -> Rows:
        """Return the tokens of some images as rows, (images * n, D)."""
        return Rows(*(tensor[images].flatten(0, 1) for tensor in self))

    def of(self, index: Tensor) -> Rows:
        """Return some of the rows."""
        return Rows(*(tensor[index] for tensor in self))


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all images."""
    return Rows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def train(
    parameters: Sequence[nn.Parameter],
    advance: Callable[[Rows], Tensor],
    rows: Rows,
    settings: LocalTraining,
) -> list[float]:
    """Train `parameters` in place; return the held-out error before and after every epoch.

    The state with the least held-out error is kept, the one before training included; after two
    epochs without a better one training ends. With one image, nothing is trained.

    Args:
        parameters: of the branch.
        advance: maps rows to the stream after the branch, (n, D).
        rows: sampled tokens of all images.
        settings: epochs and learning rate.
    """
    n_held_out = max(1, round(settings.held_out * len(rows.before)))
    if n_held_out >= len(rows.before):
        return []
    fitted, held_out = rows.flat(slice(n_held_out, None)), rows.flat(slice(n_held_out))

    def error(some: Rows) -> Tensor:
        return (some.weights * (advance(some) - some.target).square().mean(-1)).mean()

    states = KeptStates(nn.ParameterList(parameters), decay=0.0)
    states.keep_if_best(float(error(held_out)))
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    n_rows = len(fitted.before)
    schedule = CosineAnnealingLR(optimizer, settings.epochs * math.ceil(n_rows / settings.batch))
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.epochs):
        for index in torch.split(torch.randperm(n_rows, generator=generator), settings.batch):
            with torch.enable_grad():
                loss = error(fitted.of(index))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        states.keep_if_best(float(error(held_out)))
        if states.is_stale(_PATIENCE):
            break
    states.restore()
    return states.history
