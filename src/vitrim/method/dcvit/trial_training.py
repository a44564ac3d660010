"""Training of one trial: steps towards the features that the dense network has."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor, nn

from vitrim.method.dcvit.evaluation import features_of
from vitrim.trainer.mimic import FeatureLoss
from vitrim.trainer.recipe import Recipe, images_per_step, optimizer_and_schedule

TrialState = dict[str, dict[str, Any]]
"""State dicts of the network, the optimiser and the schedule."""
Views = Literal["plain", "augmented"]
"""How a trial sees the images: as they are and in one order, or augmented again in each epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecipe:
    """How a trial is trained.

    Args:
        training: epochs, learning rate and so on.
        views: of the images.
        loss: of the features.
        freeze_tail: whether the blocks after the neighbour of its last block are not trained.
    """

    training: Recipe
    views: Views
    loss: FeatureLoss
    freeze_tail: bool

    def settings(self) -> dict[str, object]:
        """Return the numbers that identify a trial, without `keep`, which came later."""
        known = asdict(self)
        del known["training"]["keep"]
        return {**known, "loss": list(self.loss)}

    def scaled_to(self, trainer: Trainer) -> TrialRecipe:
        """Return the recipe with the learning rate for the batches of one process of `trainer`."""
        if self.training.reference_batch is None:
            return self
        batch = images_per_step(trainer) // trainer.world_size
        return replace(self, training=self.training.scaled(batch))


class Targets:
    """The features that the dense network has for the images of a step.

    Of plain images they are computed once: the batches of all epochs are the same.

    Args:
        dense: in eval mode.
        views: of the images.
    """

    def __init__(self, dense: nn.Module, views: Views) -> None:
        self.dense = dense
        self.views: Views = views
        self._kept: list[Tensor] = []

    def keep(self, images: Tensor) -> None:
        """Compute the features of the next batch of plain images (B, C, H, W)."""
        if self.views == "plain":
            self._kept.append(features_of(self.dense, images))

    def lacks(self, batch_index: int) -> bool:
        """Whether the features of this plain batch are still to be kept."""
        return self.views == "plain" and batch_index == len(self._kept)

    def of(self, images: Tensor, batch_index: int) -> Tensor:
        """Return the features (B, N, D) of the batch at this index of its epoch."""
        if self.views == "augmented":
            return features_of(self.dense, images)
        return self._kept[batch_index]


class TrialTraining:
    """A compressed network in training, with its optimiser and its schedule.

    Args:
        net: changed in place, in train mode.
        dense: the network that it mimics.
        recipe: how it is trained.
        frozen: its parameters that are not trained.
        steps: how many steps there will be.
    """

    def __init__(
        self,
        net: nn.Module,
        dense: nn.Module,
        recipe: TrialRecipe,
        *,
        frozen: Collection[str],
        steps: int,
    ) -> None:
        self.net = net.train()
        self.dense = dense
        self.recipe = recipe
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.optimizer, self.schedule = optimizer_and_schedule(net, recipe.training, steps=steps)

    def step(self, images: Tensor, target: Tensor, backward: Callable[[Tensor], object]) -> Tensor:
        """Train on one batch (B, C, H, W) towards features (B, N, D); return the loss."""
        loss = distill_step(
            self.net,
            images,
            target,
            self.optimizer,
            self.recipe.training.clip_norm,
            backward,
            loss_of=self._loss,
        )
        self.schedule.step()
        return loss

    def _loss(self, features: Tensor, target: Tensor) -> Tensor:
        return self.recipe.loss.of(self.net, self.dense, features, target)

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
    *,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> Tensor:
    """Train `net` on one batch (B, C, H, W) towards features (B, N, D); return the loss, eq. 3.

    Nothing is computed for parameters that need no gradient.
    """
    features = net.forward_features(images)  # type: ignore[operator]
    loss = loss_of(features, target)
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


def trained_vector(net: nn.Module) -> Tensor:
    """Return what training changes in `net` as one tensor, (n,)."""
    return torch.cat([tensor.flatten() for tensor in trained_tensors(net)])
