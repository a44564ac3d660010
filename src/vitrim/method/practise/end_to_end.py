"""Recoverability of blocks as in PRACTISE: what training adaptors end to end can recover.

For each candidate the block is removed, adaptors are inserted around it (see
`vitrim.method.practise.adaptors`) and trained by SGD on the mean squared error of the final
features; nothing else is trained. Recoverability is the error that remains.

Where we differ from the paper's code: images are not augmented while adaptors are trained, and they
come in the same batches in every pass, so that the dense network's features are computed once per
batch for all candidates. All candidates of a process are trained side by side: their adaptors and
momenta are in memory together, 2 x candidates x blocks x D^2 numbers in a transformer of width D.
Process r of n trains the candidates r, r + n, r + 2n, ..., and may have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.blocks import Group
from vitrim.closed_form.moments import full_precision
from vitrim.jobs import distributed
from vitrim.method.practise.adaptors import (
    Adaptor,
    Place,
    Skip,
    adapted,
    channels_of,
    places_of,
    widths_of,
)
from vitrim.method.practise.saving import as_evidence, as_scores, latency_shares
from vitrim.method.practise.settings import AdaptorTraining
from vitrim.network import structure
from vitrim.plan import Evidence
from vitrim.trainer.phase import ResumePoint
from vitrim.trainer.resume import size_buffers
from vitrim.trainer.shares import own_state, states_of_all


class Candidate:
    """The network without a group of blocks, and the adaptors around it in training.

    Args:
        net: the dense network, whose weights do not change.
        group: the blocks that are removed.
        widths: channels by place, of places where adaptors may be.
        training: of the adaptors.
    """

    def __init__(
        self,
        net: nn.Module,
        group: Group,
        widths: Mapping[Place, int],
        training: AdaptorTraining,
    ) -> None:
        self.net = net
        self.skips = {block: Skip() for block in group}
        self.adaptors = {
            place: _adaptor(net.get_submodule(place.module), widths[place])
            for place in places_of(net, structure(net), group)
            if place in widths
        }
        self.modules = nn.ModuleList(self.adaptors.values())
        self.optimizer = torch.optim.SGD(
            [{"params": [*self.modules.parameters()]}],
            lr=training.lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )

    def error(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error of the features of images (B, C, H, W)."""
        with adapted(self.net, self.skips, self.adaptors):
            return F.mse_loss(_features(self.net, images), target)

    def step(self, images: Tensor, target: Tensor, lr: float) -> Tensor:
        """Train the adaptors on one batch towards features `target`; return the loss."""
        loss = self.error(images, target)
        if not self.adaptors:
            return loss.detach()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the weights of the adaptors and the state of their optimiser."""
        return {"adaptors": self.modules.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Continue from what `state_dict` returned."""
        self.modules.load_state_dict(state["adaptors"])
        self.optimizer.load_state_dict(state["optimizer"])


class EndToEnd(LightningModule):
    """Score groups of blocks by the error that remains once adaptors are trained (high: keep it).

    Evidence has `block_scores` by the first block of each group. The passes over the images train
    the adaptors; the last one measures the errors. With `latency_repeats` above 0, the first of its
    batches also measures what each group saves (`block_savings`); `scores` has a second row then.
    """

    resumes_at: ResumePoint = "batch"
    clip_norm = 0.0
    trains = False
    own_steps = True
    scores: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        groups: Sequence[Group],
        images: int,
        training: AdaptorTraining,
        latency_repeats: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.groups = list(groups)
        self.calibration_images = images
        self.training_recipe = training
        self.latency_repeats = latency_repeats
        self.epochs = training.iterations + 1 if groups else 0  # fewer, if there are more batches
        self.settings: dict[str, object] = {
            "groups": ["+".join(group) for group in groups],
            "images": images,
            "training": asdict(training),
            "latency_repeats": latency_repeats,
        }
        self.register_buffer("scores", torch.empty(0))
        self._rank, self._processes = distributed.place()
        self._own = slice(self._rank, None, self._processes)
        self._widths: dict[Place, int] = {}
        self._candidates: list[Candidate] = []
        self._iteration = 0
        self._errors = [0.0] * len(self.groups[self._own])
        self._savings: list[float] = []
        self._seen = 0
        self._interrupted: Mapping[str, Any] | None = None

    def on_train_start(self) -> None:
        """Compute how many passes the iterations take; continue what was interrupted."""
        self.net.eval()
        batches = int(self.trainer.num_training_batches)
        self.epochs = -(-self.training_recipe.iterations // batches) + 1
        self.trainer.fit_loop.max_epochs = self.epochs
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is None:
            return
        self._iteration, self._seen = interrupted["iteration"], interrupted["seen"]
        self._errors, self._savings = interrupted["errors"], interrupted["savings"]
        self._widths = {
            Place(module, before): width for module, before, width in interrupted["widths"]
        }
        self._candidates = self._build() if interrupted["candidates"] else []
        for candidate, state in zip(self._candidates, interrupted["candidates"], strict=True):
            candidate.load_state_dict(state)

    def configure_optimizers(self) -> None:
        """Return none: every candidate has an optimiser of its own."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor | None:
        """Train all candidates on images (B, C, H, W); measure them in the last epoch."""
        images = batch[0]
        if self._iteration < self.training_recipe.iterations:
            loss = self._train(images)
            if loss is not None:
                self.log("loss", loss)
            return loss
        if self.current_epoch == self.epochs - 1:
            self._measure(images)
        return None

    def on_train_epoch_end(self) -> None:
        """Compute the scores once all images are measured."""
        if self._seen:
            errors = torch.zeros(len(self.groups), dtype=torch.float64)
            errors[self._own] = torch.tensor(self._errors, dtype=torch.float64)
            errors = distributed.summed(errors)
            self.scores = as_scores(errors.tolist(), self._seen, self._savings)
            self._candidates = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the adaptors in training, and the errors so far."""
        state = {
            "iteration": self._iteration,
            "seen": self._seen,
            "errors": list(self._errors),
            "savings": self._savings,
            "widths": [[*place, width] for place, width in self._widths.items()],
            "candidates": [candidate.state_dict() for candidate in self._candidates],
        }
        checkpoint["adaptors"] = states_of_all(state, self._processes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the scores their size, and keep what was in training."""
        size_buffers(self, checkpoint["state_dict"])
        self._interrupted = own_state(checkpoint["adaptors"], self._rank, self._processes)

    def _train(self, images: Tensor) -> Tensor | None:
        """Train the adaptors of the candidates on one batch; return the mean of their losses."""
        if not self._errors:  # other processes have the candidates
            self._iteration += 1
            return None
        with _safe_precision(images), frozen(self.net):
            if not self._candidates:
                places = {
                    place
                    for group in self.groups
                    for place in places_of(self.net, structure(self.net), group)
                }
                self._widths = widths_of(self.net, sorted(places), images)
                self._candidates = self._build()
            with torch.no_grad():
                target = _features(self.net, images)
            lr = self.training_recipe.lr_at(self._iteration)
            losses = [candidate.step(images, target, lr) for candidate in self._candidates]
        self._iteration += 1
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _measure(self, images: Tensor) -> None:
        """Add the errors of one batch."""
        if self.latency_repeats and not self._savings:
            self._savings = latency_shares(self.net, self.groups, images, self.latency_repeats)
        with full_precision(images):
            target = _features(self.net, images)
            for position, candidate in enumerate(self._candidates):
                self._errors[position] += len(images) * float(candidate.error(images, target))
        self._seen += len(images)

    def _build(self) -> list[Candidate]:
        return [
            Candidate(self.net, group, self._widths, self.training_recipe)
            for group in self.groups[self._own]
        ]

    def evidence(self) -> Evidence:
        """Return the scores; empty where no image was seen."""
        return as_evidence(self.scores, [group[0] for group in self.groups])


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Compute no gradients of the parameters of `net` within this context."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _features(net: nn.Module, images: Tensor) -> Tensor:
    features: Tensor = net.forward_features(images)  # type: ignore[operator]
    return features


def _adaptor(module: nn.Module, width: int) -> Adaptor:
    convolves = isinstance(module, nn.Conv2d)
    like = next(module.parameters())
    return Adaptor(width, channels=channels_of(module), biased=not convolves, like=like)


def _safe_precision(images: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast to float16: these gradients would vanish in it."""
    device = images.device.type
    halves = torch.is_autocast_enabled(device)
    halves = halves and torch.get_autocast_dtype(device) == torch.float16
    return full_precision(images) if halves else nullcontext()
