"""Training of one trial: steps towards the features that the dense network had."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.trainer.recipe import Recipe, optimizer_and_schedule

TrialState = dict[str, dict[str, Any]]
"""State dicts of the network, the optimiser and the schedule."""


class TrialTraining:
    """A compressed network in training, with its optimiser and its schedule.

    Args:
        net: changed in place, in train mode.
        recipe: how it is trained.
        frozen: its parameters that are not trained.
        steps: how many steps there will be.
    """

    def __init__(
        self, net: nn.Module, recipe: Recipe, *, frozen: Collection[str], steps: int
    ) -> None:
        self.net = net.train()
        self.recipe = recipe
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.optimizer, self.schedule = optimizer_and_schedule(net, recipe, steps=steps)

    def step(self, images: Tensor, target: Tensor, backward: Callable[[Tensor], object]) -> Tensor:
        """Train on one batch (B, C, H, W) towards features (B, N, D); return the loss."""
        clip_norm = self.recipe.clip_norm
        loss = distill_step(self.net, images, target, self.optimizer, clip_norm, backward)
        self.schedule.step()
        return loss

    def state_dict(self) -> TrialState:
        """Return the weights and the state of optimiser and schedule."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: TrialState) -> None:
        """Continue from what `state_dict` returned."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


@torch.enable_grad()
def distill_step(
    net: nn.Module,
    images: Tensor,
    target: Tensor,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    backward: Callable[[Tensor], object],
) -> Tensor:
    """Train `net` on one batch (B, C, H, W) towards features (B, N, D); return the loss, eq. 3.

    Nothing is computed for parameters that need no gradient.
    """
    features = net.forward_features(images)  # type: ignore[operator]
    loss = F.mse_loss(features, target)
    optimizer.zero_grad()
    backward(loss)
    if clip_norm:
        nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
    optimizer.step()
    return loss.detach()


def trained_tensors(net: nn.Module) -> list[Tensor]:
    """Return what training changes in `net`: its parameters and its BatchNorms' statistics."""
    statistics = (tensor for name, tensor in net.named_buffers() if ".running_" in name)
    return [tensor.detach() for tensor in (*net.parameters(), *statistics)]
