"""Recovery without labels: the dense network is the teacher."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from vitrim.network import structure
from vitrim.network.structure import block_order
from vitrim.trainer.calibrate import classifiers
from vitrim.trainer.phase import AllButHeldOut, ResumePoint
from vitrim.trainer.recipe import Recipe, adamw_cosine


class FeatureLoss(NamedTuple):
    """The error of a network's features: token_weight * MSE(tokens) + pooled_weight * MSE(pooled).

    `pooled` is what the classifier reads of the features: a class token, say.
    """

    token_weight: float = 1.0
    pooled_weight: float = 0.0

    def of(self, net: nn.Module, teacher: nn.Module, features: Tensor, target: Tensor) -> Tensor:
        """Return the loss of the features that `net` has, towards those of `teacher`."""
        loss = self.token_weight * F.mse_loss(features, target)
        if self.pooled_weight:
            pooled = net.forward_head(features, pre_logits=True)  # type: ignore[operator]
            with torch.no_grad():
                wanted = teacher.forward_head(target, pre_logits=True)  # type: ignore[operator]
            loss = loss + self.pooled_weight * F.mse_loss(pooled, wanted)
        return loss


def log_agreement(phase: LightningModule, logits: Tensor, target: Tensor, loss: Tensor) -> None:
    """Log a batch of a validation: the share of images of which two networks say the same class.

    It becomes `agreement`, in percent, and the loss becomes `val_loss`; both are means over the
    images of all processes. Networks without a classifier have no `agreement`.

    Args:
        phase: in its `validation_step`.
        logits: of the network in training, (B, classes).
        target: the teacher's.
        loss: a mean over the batch.
    """
    metrics = {"val_loss": loss.float()}
    if getattr(phase.net, "num_classes", 1):
        metrics["agreement"] = 100 * (logits.argmax(-1) == target.argmax(-1)).float().mean()
    phase.log_dict(metrics, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(logits))


class Mimic(LightningModule):
    """Train `net` to have the teacher's features: mean squared error over all tokens.

    The loss of MiR (arXiv 2201.02620) and of DC-ViT (arXiv 2403.18708, eq. 3): features are those
    before the classifier, after the final norm. Further terms may be added:

        loss = token_weight * MSE(tokens) + pooled_weight * MSE(pooled) + logits_weight * distill

    with the error of what the classifier reads of the features (of a class token, say), which
    hardly counts among all tokens, and the loss of `Distill`. The classifier is the teacher's, as
    in MiR, unless `logits_weight` is above 0: that term trains it. Parameters named in `frozen` are
    not trained. `images` leaves out some training images; None: it sees all.
    """

    resumes_at: ResumePoint = "batch"
    trains = True
    best_by = "agreement"

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        *,
        recipe: Recipe,
        token_weight: float = 1.0,
        pooled_weight: float = 0.0,
        logits_weight: float = 0.0,
        temperature: float = 1.0,
        frozen: Collection[str] = (),
        images: AllButHeldOut | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.calibration_images = images
        self.recipe = recipe
        self.epochs = recipe.epochs
        self.clip_norm = recipe.clip_norm
        self.frozen = frozenset(frozen)
        self.loss = FeatureLoss(token_weight, pooled_weight)
        self.logits_weight = logits_weight
        self.temperature = temperature
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Copy the teacher's classifier, unless it is trained."""
        for name, head in classifiers(self._teacher[0]) if not self.logits_weight else ():
            self.net.get_submodule(name).load_state_dict(head.state_dict())

    def on_fit_end(self) -> None:
        """Make the frozen parameters trainable again."""
        self.net.requires_grad_()

    @property
    def networks(self) -> list[nn.Module]:
        """The network and its teacher."""
        return [self.net, *self._teacher]

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Return the features, and what else the loss reads."""
        features = self.net.forward_features(images)  # type: ignore[operator]
        read = [features]
        if self.loss.pooled_weight:
            read.append(self.net.forward_head(features, pre_logits=True))  # type: ignore[operator]
        if self.logits_weight:
            read.append(self.net.forward_head(features))  # type: ignore[operator]
        return read

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch; its labels are not used."""
        images = batch[0]
        teacher = self._teacher[0].to(images.device).eval()
        features = self.net.forward_features(images)  # type: ignore[operator]
        with torch.no_grad():
            target = teacher.forward_features(images)  # type: ignore[operator]
        loss = self.loss.of(self.net, teacher, features, target)
        if self.logits_weight:
            logits = self.net.forward_head(features)  # type: ignore[operator]
            with torch.no_grad():
                wanted = teacher.forward_head(target)  # type: ignore[operator]
            loss = loss + self.logits_weight * soft_loss(logits, wanted, self.temperature)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log agreement and loss on one batch (`log_agreement`)."""
        images = batch[0]
        teacher = self._teacher[0].to(images.device).eval()
        features, target = (net.forward_features(images) for net in (self.net, teacher))  # type: ignore[operator]
        logits, wanted = self.net.forward_head(features), teacher.forward_head(target)  # type: ignore[operator]
        loss = self.loss.of(self.net, teacher, features, target)
        if self.logits_weight:
            loss = loss + self.logits_weight * soft_loss(logits, wanted, self.temperature)
        log_agreement(self, logits, wanted, loss)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the cosine schedule of the recipe, for what is not frozen."""
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        return adamw_cosine(self.net, self.recipe, self.trainer)


class Distill(LightningModule):
    """Train `net` to give the teacher's class probabilities (Hinton et al., arXiv 1503.02531)."""

    calibration_images = None
    resumes_at: ResumePoint = "batch"
    trains = True
    best_by = "agreement"

    def __init__(
        self, net: nn.Module, teacher: nn.Module, *, recipe: Recipe, temperature: float
    ) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.epochs = recipe.epochs
        self.clip_norm = recipe.clip_norm
        self.temperature = temperature
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module

    @property
    def networks(self) -> list[nn.Module]:
        """The network and its teacher."""
        return [self.net, *self._teacher]

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Return the logits."""
        return [self.net(images)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch; its labels are not used."""
        images = batch[0]
        teacher = self._teacher[0].to(images.device).eval()
        with torch.no_grad():
            target = teacher(images)
        loss = soft_loss(self.net(images), target, self.temperature)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log agreement and loss on one batch (`log_agreement`)."""
        images = batch[0]
        target = self._teacher[0].to(images.device).eval()(images)
        logits = self.net(images)
        log_agreement(self, logits, target, soft_loss(logits, target, self.temperature))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the cosine schedule of the recipe."""
        return adamw_cosine(self.net, self.recipe, self.trainer)


def soft_loss(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of the softened probabilities, a mean over the batch.

    >>> soft_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 2.0).item()
    0.0
    """
    student, teacher = ((x / temperature).log_softmax(-1) for x in (logits, target))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def frozen_parameters(
    net: nn.Module, blocks: Sequence[str], *, freeze_tail: bool, dense: nn.Module | None = None
) -> set[str]:
    """Return the names of the parameters of `net` that are frozen while `blocks` are tuned.

    These are the classifier's and, with `freeze_tail`, those of the blocks after the next
    neighbour of the last of `blocks`. `dense` is the network that defines the order of the blocks,
    where `net` may lack some of them.
    """
    frozen = [name for name, _ in classifiers(net)]
    if freeze_tail and blocks:
        order = block_order(structure(net if dense is None else dense))
        last = max(order.index(block) for block in blocks) + 1
        frozen += order[last + 1 :]
    prefixes = tuple(f"{path}." for path in frozen)
    return {name for name, _ in net.named_parameters() if name.startswith(prefixes)}
