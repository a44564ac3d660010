"""Recovery without labels: the dense network is the teacher."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.network import structure
from vitrim.network.structure import order_of
from vitrim.trainer.calibrate import classifiers
from vitrim.trainer.recipe import Recipe, optimisation


class Mimic(LightningModule):
    """Train `net` to have the teacher's features: mean squared error over all tokens.

    The loss of MiR (arXiv 2201.02620) and of DC-ViT (arXiv 2403.18708, eq. 3): features are those
    before the classifier, after the final norm; `every` weighs it. `pooled` times the error of what
    the classifier reads of them (of a class token, say) is added: among all tokens it hardly
    counts. The classifier is the teacher's, as in MiR, unless `logits` is above 0: then as many
    times the loss of `Distill` is added, which trains it. Parameters named in `frozen` stay.
    """

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        *,
        recipe: Recipe,
        every: float = 1.0,
        pooled: float = 0.0,
        logits: float = 0.0,
        temperature: float = 1.0,
        frozen: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.epochs = recipe.epochs
        self.frozen = frozenset(frozen)
        self.every = every
        self.pooled = pooled
        self.logits = logits
        self.temperature = temperature
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Put the teacher's classifier on top."""
        for name, head in classifiers(self._teacher[0]) if not self.logits else ():
            self.net.get_submodule(name).load_state_dict(head.state_dict())

    def on_fit_end(self) -> None:
        """Let what was frozen be trained again."""
        self.net.requires_grad_()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch; its labels are not looked at."""
        images = batch[0]
        teacher = self._teacher[0].to(images.device).eval()
        features = self.net.forward_features(images)  # type: ignore[operator]
        with torch.no_grad():
            aim = teacher.forward_features(images)  # type: ignore[operator]
        loss = self.every * F.mse_loss(features, aim)
        if self.pooled:
            pooled, wanted = (
                net.forward_head(x, pre_logits=True)  # type: ignore[operator]
                for net, x in ((self.net, features), (teacher, aim))
            )
            loss = loss + self.pooled * F.mse_loss(pooled, wanted)
        if self.logits:
            logits = self.net.forward_head(features)  # type: ignore[operator]
            with torch.no_grad():
                wanted = teacher.forward_head(aim)  # type: ignore[operator]
            loss = loss + self.logits * soft_loss(logits, wanted, self.temperature)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW and the cosine schedule of the recipe."""
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        steps = int(self.trainer.estimated_stepping_batches)
        return optimisation(self.net, self.recipe, steps=steps)


class Distill(LightningModule):
    """Train `net` to give the teacher's class probabilities (Hinton et al., arXiv 1503.02531)."""

    def __init__(
        self, net: nn.Module, teacher: nn.Module, *, recipe: Recipe, temperature: float
    ) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.epochs = recipe.epochs
        self.temperature = temperature
        self._teacher = [teacher]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch; its labels are not looked at."""
        images = batch[0]
        teacher = self._teacher[0].to(images.device).eval()
        with torch.no_grad():
            wanted = teacher(images)
        loss = soft_loss(self.net(images), wanted, self.temperature)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW and the cosine schedule of the recipe."""
        steps = int(self.trainer.estimated_stepping_batches)
        return optimisation(self.net, self.recipe, steps=steps)


def soft_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of the softened probabilities, a mean over the batch.

    >>> soft_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 2.0).item()
    0.0
    """
    student, teacher = ((x / temperature).log_softmax(-1) for x in (logits, wanted))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def frozen(
    net: nn.Module, blocks: Sequence[str], *, front: bool, dense: nn.Module | None = None
) -> set[str]:
    """Return the parameters of `net` that stay while blocks are tuned: classifier, and the rear.

    With `front`, the blocks after the neighbour of the last of `blocks` stay as they are; `dense`
    is the network that says their order, where `net` may lack some of them.
    """
    fixed = [name for name, _ in classifiers(net)]
    if front and blocks:
        order = order_of(structure(net if dense is None else dense))
        last = max(order.index(block) for block in blocks) + 1
        fixed += order[last + 1 :]
    inside = tuple(f"{path}." for path in fixed)
    return {name for name, _ in net.named_parameters() if name.startswith(inside)}
