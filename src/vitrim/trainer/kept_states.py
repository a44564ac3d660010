"""States of a phase that are kept while it trains: the best so far, and a moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class KeptStates:
    """The best state of a module and the moving average of its states.

    A state has the parameters that are trained and the buffers. `history` has what each state was
    evaluated to, lower is better; what is not finite counts as infinite.

    Args:
        module: whose states are kept.
        decay: of the average, below 1; 0: there is none. In step n it is at most
            (1 + n) / (10 + n), so that the average of few steps is not that of the beginning.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.history: list[float] = []
        self._module = module
        self._best: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}

    def is_stale(self, patience: int | None) -> bool:
        """Whether so many states were evaluated since the best one; never with None."""
        since = len(self.history) - 1 - self.history.index(min(self.history))
        return patience is not None and since >= patience

    def start(self) -> None:
        """Begin the average with the present state, or continue on the device of the module."""
        state = _changing(self._module)
        for kept in (self._best, self._average):
            kept.update({name: tensor.to(state[name].device) for name, tensor in kept.items()})
        if self.decay and not self._average:
            self._average = _copied(state)

    @torch.no_grad()
    def move_average(self, step: int) -> None:
        """Move the average towards the present state, the one after `step` optimiser steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = _changing(self._module)
        for name, tensor in self._average.items():
            if tensor.is_floating_point():
                tensor.lerp_(state[name], 1 - decay)
            else:
                tensor.copy_(state[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average in place of the present state for a while, if there is one."""
        present = _copied(_changing(self._module)) if self._average else {}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(present)

    def keep_if_best(self, value: float) -> None:
        """Add the value of the state in place to the history, and keep the state if it is best."""
        value = value if math.isfinite(value) else math.inf
        if not self.history or value < min(self.history):
            self._best = _copied(_changing(self._module))
        self.history.append(value)

    def restore(self) -> None:
        """Return to the best state, or to the average where none was evaluated; forget both."""
        self._put(self._best or self._average)
        self._best, self._average = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers, to continue from."""
        return {"best": self._best, "average": self._average, "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._best, self._average = dict(state["best"]), dict(state["average"])
        self.history = list(state["history"])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        state = _changing(self._module) if values else {}
        for name, tensor in values.items():
            state[name].copy_(tensor)


def _changing(module: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters and the persistent buffers, by name; no copies."""
    trained = {name for name, tensor in module.named_parameters() if tensor.requires_grad}
    fixed = {name for name, _ in module.named_parameters()} - trained
    return {name: tensor for name, tensor in module.state_dict().items() if name not in fixed}


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
