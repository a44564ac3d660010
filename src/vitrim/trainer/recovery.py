"""Recovery from few unlabelled images that does not overfit them: the dense network is the teacher.

    loss = token_weight * e(tokens) + pooled_weight * e(pooled) + logits_weight * T^2 KL(logits)

with e the mean squared error relative to the variance of the dense network's values, `pooled` what
the classifier reads, and KL the divergence of the student's softened probabilities from the dense
network's (Hinton et al., arXiv 1503.02531). Both networks see the same view of an image, so that
every view has a target of its own (Beyer et al., arXiv 2106.05237). A share of the images is held
out. After every epoch the divergence on them is measured, and the best state is kept, the state
before training included: on held-out images recovery never loses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call

from vitrim.closed_form.moments import full_precision
from vitrim.data.loader import n_held_out
from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.jobs import distributed
from vitrim.trainer.calibrate import Sampling, classifiers
from vitrim.trainer.kept_states import KeptStates
from vitrim.trainer.low_rank_updates import LowRankUpdates
from vitrim.trainer.mimic import log_agreement, soft_loss
from vitrim.trainer.phase import ResumePoint, SplitImages
from vitrim.trainer.recipe import Recipe, adamw_cosine
from vitrim.trainer.views import Views

_log = logging.getLogger(__name__)

Trained = Literal["all", "scales", "low_rank"]
"""All parameters; vectors only (norms, layer scales, biases); or these and low-rank updates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySettings:
    """How a compact network recovers from few images (conf/method/base/recovery.yaml).

    Args:
        trained: which parameters.
        rank: of the updates with `trained` low_rank; None with the others.
        views: of the images that both networks see.
        token_weight: of the error of all tokens.
        pooled_weight: of the error of what the classifier reads.
        logits_weight: of the divergence of the logits.
        temperature: of that divergence, on held-out images as well.
        ema: decay of a moving average of the weights, which is evaluated and kept; 0: none.
        held_out: share of the images that are held out, 0: none, and the last state is kept.
        patience: epochs without a better state after which training ends; None: it does not.
        training: epochs, learning rate and so on.
    """

    trained: Trained
    rank: int | None
    views: Views
    token_weight: float
    pooled_weight: float
    logits_weight: float
    temperature: float
    ema: float
    held_out: float
    patience: int | None
    training: Recipe

    def __post_init__(self) -> None:
        rank, patience = self.rank, self.patience
        weights = (self.token_weight, self.pooled_weight, self.logits_weight)
        require(
            "method.tuning.recovery",
            self,
            ("trained", self.trained in get_args(Trained), ", ".join(get_args(Trained))),
            (
                "rank",
                is_count(rank) if self.trained == "low_rank" else rank is None,
                "a whole number from 1 on with trained=low_rank, null with the others",
            ),
            *(
                (name, is_rate(getattr(self, name)), "a number from 0 on")
                for name in ("token_weight", "pooled_weight", "logits_weight")
            ),
            ("temperature", is_positive(self.temperature), "a number above 0"),
            ("ema", is_rate(self.ema) and self.ema < 1, "a decay from 0 to below 1"),
            ("held_out", is_rate(self.held_out) and self.held_out <= 0.5, "a share from 0 to 0.5"),
            (
                "patience",
                patience is None or (is_count(patience) and self.held_out > 0),
                "null or a whole number of epochs from 1 on; null with held_out=0",
            ),
        )
        one = all(map(is_rate, weights)) and any(weights)
        require(
            "method.tuning.recovery",
            self,
            ("logits_weight", one, "a weight above 0 here, or of tokens or pooled features"),
        )
        self.training.refuse("method.tuning.recovery.training", "ema_decay", "repeats", "keep")

    def calibration(self, sampling: Sampling) -> Sampling:
        """Return the sampling without images that are held out of those of `sampling`.

        A state is compared with the one before training: if that was computed from the images that
        are held out, it would look better than it is. As many tokens of each image are sampled. In
        a training set of fewer images than `sampling` says, whose number is not known from
        data.samples, the images that are held out may be among those of the calibration.
        """
        n = min(sampling.images, sampling.available_images or sampling.images)
        n_calibration = n - n_held_out(n, self.held_out)
        if n_calibration == n or not n_calibration:
            return sampling
        return replace(
            sampling,
            images=n_calibration,
            tokens=sampling.tokens_per_image,
            available_images=None,
        )

    def images(self, n: int) -> SplitImages:
        """Return at most `n` images, with those that are held out among them."""
        return SplitImages(images=n, held_out=self.held_out)


class Outputs(NamedTuple):
    """What a network computes of images: features, what its classifier reads of them, logits."""

    features: Tensor
    pooled: Tensor
    logits: Tensor


class _OutputsOf(nn.Module):
    """The outputs of a network as a module, for `functional_call`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Outputs:
        """Return the outputs of images (B, C, H, W)."""
        features = self.net.forward_features(images)  # type: ignore[operator]
        pooled = self.net.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return Outputs(features, pooled, self.net.forward_head(features))  # type: ignore[operator]


class Network:
    """A network as a function of images (B, C, H, W), with low-rank updates if it has any.

    No module: a phase that holds one neither saves nor trains it.
    """

    def __init__(self, net: nn.Module, updates: LowRankUpdates | None = None) -> None:
        self.net = net
        self.updates = updates
        self._outputs = _OutputsOf(net)

    def __call__(self, images: Tensor) -> Outputs:
        """Return what the network computes."""
        if self.updates is None:
            return cast(Outputs, self._outputs(images))
        weights = {f"net.{name}": w for name, w in self.updates.weights(self.net).items()}
        outputs = functional_call(self._outputs, weights, (images,))
        return cast(Outputs, outputs)


def relative_error(x: Tensor, target: Tensor, *, of_all: bool = False) -> Tensor:
    """Return the mean squared error of `x` relative to the variance of `target`.

    With `of_all` the variance is that of the batches of all processes, so that the mean over these
    is the error of one batch.

    >>> relative_error(torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0])).item()
    1.0
    """
    variance = _variance_of_all(target) if of_all else target.float().var(correction=0)
    least = torch.finfo(torch.float32).tiny
    return F.mse_loss(x.float(), target.float()) / variance.clamp_min(least)


def _variance_of_all(x: Tensor) -> Tensor:
    """Return the variance of x over the batches of all processes, which have one shape."""
    if distributed.place()[1] == 1:
        return x.float().var(correction=0)
    wide = x.double()
    sums = distributed.summed(torch.stack([wide.mean(), wide.square().mean()]))
    mean, square = (sums / distributed.place()[1]).unbind()
    return (square - mean.square()).clamp_min(0.0).float()


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryLoss:
    """The loss that is trained, and the distance by which states are compared.

    Args:
        settings: weights and temperature.
        has_logits: False where the network has no classifier: then the relative error of pooled
            features stands in for the divergence of logits.
    """

    settings: RecoverySettings
    has_logits: bool

    def of(self, found: Outputs, target: Outputs, *, of_all: bool = True) -> Tensor:
        """Return the weighted sum of the errors of features and logits.

        With `of_all` errors are relative to variances over all processes (`relative_error`).
        """
        how = self.settings
        loss = torch.zeros((), device=found.pooled.device)
        if how.token_weight:
            error = relative_error(found.features, target.features, of_all=of_all)
            loss = loss + how.token_weight * error
        if how.pooled_weight:
            error = relative_error(found.pooled, target.pooled, of_all=of_all)
            loss = loss + how.pooled_weight * error
        if how.logits_weight:
            loss = loss + how.logits_weight * self.distance(found, target)
        return loss

    def read_of(self, found: Outputs) -> list[Tensor]:
        """Return the outputs that the loss depends on."""
        weights = (how := self.settings).token_weight, how.pooled_weight, how.logits_weight
        read = found if self.has_logits else found._replace(logits=found.pooled)
        return [output for weight, output in zip(weights, read, strict=True) if weight]

    def distance(self, found: Outputs, target: Outputs) -> Tensor:
        """Return the divergence of the logits, or the error of pooled features."""
        if self.has_logits:
            logits = (found.logits.float(), target.logits.float())
            return soft_loss(*logits, self.settings.temperature)
        return relative_error(found.pooled, target.pooled)


class HeldOut:
    """Images on which a network is compared with its teacher.

    Args:
        batches: of images (B, C, H, W), the same whenever they are iterated over.
        loss: whose distance is measured.
    """

    def __init__(self, batches: Iterable[Sequence[Tensor]], loss: RecoveryLoss) -> None:
        self.batches = batches
        self.loss = loss
        self._targets: list[Outputs] = []

    @torch.no_grad()
    def keep_targets(self, teacher: Network) -> None:
        """Compute once what the teacher has for these images; its features are not kept."""
        like = next(teacher.net.parameters())
        for batch in self.batches:
            with full_precision(like):
                target = teacher(batch[0].to(like))
            self._targets.append(target._replace(features=torch.empty(0)))

    @torch.no_grad()
    def distance(self, student: Network) -> float:
        """Return the distance between student and teacher, a mean over the images."""
        like = next(student.net.parameters())
        total, images = 0.0, 0
        for batch, target in zip(self.batches, self._targets, strict=True):
            with full_precision(like):
                distance = self.loss.distance(student(batch[0].to(like)), target)
            total += len(target.pooled) * float(distance)
            images += len(target.pooled)
        return total / images


class Recovery(LightningModule):
    """Train `net` towards the teacher on few images, and keep the state that is best on others.

    With images that are held out the result is the state, of the one before training and those
    after each epoch, whose distance from the teacher on them is least (`RecoveryLoss.distance`).

    Args:
        net: the compact network, changed in place.
        teacher: the dense network.
        settings: how it recovers.
        images: unlabelled training images, drawn by the run's seed, at most; those that are held
            out are among them.
    """

    resumes_at: ResumePoint = "batch"
    trains = True
    best_by = "agreement"

    def __init__(
        self, net: nn.Module, teacher: nn.Module, *, settings: RecoverySettings, images: int
    ) -> None:
        super().__init__()
        self.net = net
        self.how = settings
        self.epochs = settings.training.epochs
        self.clip_norm = settings.training.clip_norm
        self.calibration_images = settings.images(images)
        self.updates = None if settings.rank is None else LowRankUpdates(net, settings.rank)
        self.states = KeptStates(self, decay=settings.ema)
        self.loss = RecoveryLoss(settings=settings, has_logits=any(True for _ in classifiers(net)))
        self._student, self._teacher = Network(net, self.updates), Network(teacher)
        self._held_out = HeldOut((), self.loss)
        self._is_continued = False
        self.networks = (net, teacher)
        self.outputs = lambda images: self.loss.read_of(self._student(images))

    def hold_out(self, images: Iterable[Sequence[Tensor]]) -> None:
        """Take the batches of images on which states are compared."""
        self._held_out = HeldOut(images, self.loss)

    def on_train_start(self) -> None:
        """Compute the teacher's outputs of held-out images; evaluate the state before training."""
        self._teacher.net.to(self.device).eval()
        self.states.start()
        if self.how.held_out:
            self._held_out.keep_targets(self._teacher)
            if not self.states.history:
                _evaluate(self.states, self._held_out, self._student)
            self.trainer.should_stop |= self.states.is_stale(self.how.patience)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of a view of one batch; its labels are not used."""
        images = self.how.views.of(batch[0])
        with torch.no_grad():
            target = self._teacher(images)
        loss = self.loss.of(self._student(images), target)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log agreement and loss of the state, or the average, on one batch."""
        images = batch[0]
        with self.states.averaged():
            found = self._student(images)
        target = self._teacher(images)
        loss = self.loss.of(found, target, of_all=False)
        log_agreement(self, found.logits, target.logits, loss)

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        """Do one step, and move the average of the weights."""
        super().optimizer_step(*args, **kwargs)  # type: ignore[arg-type]
        self.states.move_average(self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        """Evaluate the state on held-out images; keep the best, and stop if none is better."""
        if self.how.held_out:
            _evaluate(self.states, self._held_out, self._student)
            self.log("held_out", self.states.history[-1], prog_bar=True)
            self.trainer.should_stop |= self.states.is_stale(self.how.patience)

    def on_train_end(self) -> None:
        """Return to the best state, or to the average; merge low-rank updates."""
        history = self.states.history
        if history:
            _log.info(
                "distance from the dense network on held-out images: %.4g before recovery, "
                "%.4g after (epoch %d of %d)",
                *(history[0], min(history), history.index(min(history)), len(history) - 1),
            )
        self._is_continued = False
        self.states.restore()
        if self.updates is not None:
            self.updates.merge(self.net)

    def on_fit_end(self) -> None:
        """Make all parameters trainable again."""
        if self._is_continued:  # from after the last epoch: Lightning trains no more
            self.on_train_end()
        self.net.requires_grad_()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the best state, the average and the history."""
        checkpoint["states"] = self.states.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the best state, the average and the history."""
        self.states.load_state_dict(checkpoint["states"])
        self._is_continued = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the cosine schedule of the recipe, for what is trained."""
        for parameter in self.net.parameters():
            parameter.requires_grad_(self.how.trained == "all" or parameter.ndim <= 1)
        return adamw_cosine(self, self.how.training, self.trainer)


def _evaluate(states: KeptStates, held_out: HeldOut, student: Network) -> None:
    """Compare the state, or the average, with the teacher; keep it if it is the best."""
    with states.averaged():
        student.net.eval()
        states.keep_if_best(distributed.broadcast(held_out.distance(student)))
        student.net.train()
