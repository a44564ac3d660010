"""How a network's residual stream runs: what is added to it, branch by branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One step x + f(x) of the stream.

    `name` is the branch's module path as in `Structure.branches`, `before` that of the norm whose
    input is x; `apply` is f, norm and layer scale included; `scale` is the layer scale that its
    last Linear's output is multiplied by, (D,), or None. `tokens` brings what flows inside f into
    the order of the stream's tokens, (B, N, channels).
    """

    name: str
    before: str
    apply: Callable[[Tensor], Tensor]
    scale: Tensor | None
    tokens: Callable[[Tensor], Tensor]

    def advance(self, x: Tensor) -> Tensor:
        """Return the stream after the step."""
        return x + self.apply(x)

    def unscaled(self, x: Tensor) -> Tensor:
        """Return x (..., D) before the layer scale; where that is zero, nothing gets through: 0."""
        if self.scale is None:
            return x
        scale = self.scale.to(x)
        return x / torch.where(scale == 0, torch.inf, scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """One step f(x) to a stream of other tokens and width; `before` is the module that reads x."""

    before: str
    apply: Callable[[Tensor], Tensor]

    def advance(self, x: Tensor) -> Tensor:
        """Return the stream after the step."""
        return self.apply(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The stream x from the images on, (B, N, D) or (B, H, W, D).

    `embed` makes it of images (B, C, H, W); `after` is the module path of the norm that reads it
    when all steps are through; of its tokens the first `prefix` are no patches, and the first
    `readout` of them are what the classifier reads. `alone`: that norm's output is all that the
    network's features are.
    """

    embed: Callable[[Tensor], Tensor]
    steps: tuple[Branch | Merge, ...]
    after: str
    prefix: int
    readout: int
    alone: bool

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The steps that are branches."""
        return tuple(step for step in self.steps if isinstance(step, Branch))

    def features(self, net: nn.Module, x: Tensor, first: int) -> Tensor:
        """Return what `net` makes of its stream x before the step at place `first`: its features.

        `net` is the described network, and `alone`.
        """
        assert self.alone
        for step in self.steps[first:]:
            x = step.advance(x)
        found: Tensor = net.get_submodule(self.after)(x)
        return found

    def following(self, step: Branch | Merge) -> str:
        """Return the path of the module whose input is the stream after `step`."""
        place = self.steps.index(step) + 1
        return self.steps[place].before if place < len(self.steps) else self.after
