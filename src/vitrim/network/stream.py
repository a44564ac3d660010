"""The residual stream of a network: the steps that add to it, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchStep:
    """One step x + f(x) of the stream.

    Args:
        name: the branch's module path as in `Structure.branches`.
        reader: the path of the norm whose input is x.
        apply: f, norm and layer scale included.
        scale: the layer scale that multiplies the output of the branch's last Linear, (D,), or
            None.
        tokens: maps an activation inside f to the order of the stream's tokens, (B, N, channels).
        pointwise: the path of the last module of f, if only that one maps every token by itself; it
            computes what `added` reads. Empty: of an MLP, all of f does.
    """

    name: str
    reader: str
    apply: Callable[[Tensor], Tensor]
    scale: Tensor | None
    tokens: Callable[[Tensor], Tensor]
    pointwise: str = ""

    def advance(self, x: Tensor) -> Tensor:
        """Return the stream after the step."""
        return x + self.apply(x)

    def added(self, x: Tensor) -> Tensor:
        """Return what the step adds if its last Linear has the output x (..., D)."""
        return x if self.scale is None else x * self.scale.to(x)

    def unscaled(self, x: Tensor) -> Tensor:
        """Return x (..., D) before the layer scale, and 0 where the layer scale is zero."""
        if self.scale is None:
            return x
        scale = self.scale.to(x)
        return x / torch.where(scale == 0, torch.inf, scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeStep:
    """One step f(x) to a stream of other tokens and width; `reader` is the module that reads x."""

    reader: str
    apply: Callable[[Tensor], Tensor]

    def advance(self, x: Tensor) -> Tensor:
        """Return the stream after the step."""
        return self.apply(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The stream x from the images on, (B, N, D) or (B, H, W, D).

    Args:
        embed: maps images (B, C, H, W) to x.
        steps: what is applied to x, in order.
        final_norm: the module path of the norm that reads x after all steps.
        n_prefix_tokens: number of leading tokens that are not patches.
        n_readout_tokens: number of leading tokens that the classifier reads; 0 where it reads a
            mean over tokens.
        norm_is_features: whether the final norm's output is all of the network's features.
        final_input: maps x to what the final norm reads.
    """

    embed: Callable[[Tensor], Tensor]
    steps: tuple[BranchStep | MergeStep, ...]
    final_norm: str
    n_prefix_tokens: int
    n_readout_tokens: int
    norm_is_features: bool
    final_input: Callable[[Tensor], Tensor] = field(default=lambda x: x)

    @property
    def branches(self) -> tuple[BranchStep, ...]:
        """The steps that are branches."""
        return tuple(step for step in self.steps if isinstance(step, BranchStep))

    def features(self, net: nn.Module, x: Tensor, first: int) -> Tensor:
        """Return the features of `net` for the stream x before the step at index `first`.

        `net` is the described network; `norm_is_features` must be true.
        """
        assert self.norm_is_features
        for step in self.steps[first:]:
            x = step.advance(x)
        features: Tensor = net.get_submodule(self.final_norm)(self.final_input(x))
        return features

    def reader_after(self, step: BranchStep | MergeStep) -> str:
        """Return the path of the module whose input is the stream after `step`."""
        index = self.steps.index(step) + 1
        return self.steps[index].reader if index < len(self.steps) else self.final_norm


def paired_steps(
    dense: Stream, compact: Stream
) -> Iterator[tuple[BranchStep | MergeStep, BranchStep | MergeStep | None]]:
    """Iterate over the steps of a dense network, each with that of its compact network.

    That is None where the compact network has lost the branch.
    """
    kept = {branch.name for branch in compact.branches}
    own = iter(compact.steps)
    for step in dense.steps:
        is_dropped = isinstance(step, BranchStep) and step.name not in kept
        yield step, None if is_dropped else next(own)
