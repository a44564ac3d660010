"""Recoverability of blocks in closed form: one linear map replaces a block, or nothing does.

A quick approximation (ours) of PRACTISE's score, whose adaptors are trained end to end
(`vitrim.method.practise.end_to_end`): the map x + A x + c is solved by least squares on what
entered and left the blocks, so that all candidates are evaluated in two passes over the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.blocks import Group
from vitrim.closed_form.moments import Moments, full_precision
from vitrim.closed_form.reconstruction import ridge_fit
from vitrim.method.practise.adaptors import Skip, adapted, channels_of
from vitrim.method.practise.saving import as_evidence, as_scores, latency_shares
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.phase import ResumePoint


class LinearReplacement(nn.Module):
    """x + A x + c over the channels of x, which are its dimension `channels`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.channels = channels

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Map x to its own shape."""
        moved = x.movedim(self.channels, -1)
        return x + F.linear(moved, self.weight, self.bias).movedim(-1, self.channels)


class Recoverability(LightningModule):
    """Score groups of blocks by the error of the features without them (higher: keep it).

    Evidence has `block_scores`, mean squared errors, by the first block of each group. `adaptors`
    says whether removed blocks are replaced by a linear map, else by nothing; `ridge` is relative
    to the mean variance of what enters them. With `latency_repeats` above 0, what each group saves
    is measured (`block_savings`); `scores` has a second row then.
    """

    resumes_at: ResumePoint = "never"
    clip_norm = 0.0
    trains = False
    scores: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        groups: Sequence[Group],
        sampling: Sampling,
        adaptors: bool,
        ridge: float,
        latency_repeats: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.groups = {group[0]: group for group in groups}
        self.calibration_images = sampling.images
        self.sampling = sampling
        self.adaptors = adaptors
        self.ridge = ridge
        self.latency_repeats = latency_repeats
        self.epochs = 2 if groups else 0
        self.settings: dict[str, object] = {
            "blocks": ["+".join(group) for group in groups],
            "sampling": asdict(sampling),
            "adaptors": adaptors,
            "ridge": ridge,
        }
        if latency_repeats:
            self.settings["latency_repeats"] = latency_repeats
        self.register_buffer("scores", torch.empty(0))
        self._moments: dict[str, Moments] = {}
        self._replacements: dict[str, nn.Module] = {}
        self._errors: list[float] = []
        self._savings: list[float] = []
        self._seen = 0

    def on_train_start(self) -> None:
        """Set the network to eval mode, in which it is used."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained by gradient."""

    @torch.no_grad()
    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Gather statistics of images (B, C, H, W); in the second epoch, evaluate replacements."""
        with full_precision(batch[0]):
            (self._evaluate if self.current_epoch else self._gather)(batch[0])

    def on_train_epoch_end(self) -> None:
        """Solve the adaptors after the first epoch; compute the scores after the second."""
        if self.current_epoch == 0:
            self._replacements = {
                block: self._replacement(block).to(self.device) for block in self.groups
            }
            self._errors = [0.0] * len(self.groups)
        else:
            self.scores = as_scores(self._errors, self._seen, self._savings)

    def _gather(self, images: Tensor) -> None:
        """Add what enters and leaves each group of blocks to its moments."""
        with _captured(self.net, self.groups) as flows:
            self.net(images)
        for block, streams in flows.items() if self.adaptors else ():
            channels = channels_of(self.net.get_submodule(block))
            x, y = (stream.movedim(channels, -1).flatten(1, -2) for stream in streams)
            stride = max(1, x.shape[1] // (self.sampling.tokens_per_image or x.shape[1]))
            x, y = (rows[:, ::stride].flatten(0, 1) for rows in (x, y))
            moments = self._moments.setdefault(block, Moments(block, 2 * x.shape[1]))
            moments.add(torch.cat([x, y - x], dim=-1), torch.ones(len(x), device=x.device))

    def _replacement(self, block: str) -> nn.Module:
        """Return what replaces a group: the linear map, by least squares, or nothing."""
        if not self.adaptors:
            return Skip()
        moments = self._moments.pop(block)
        moments.finish()
        size = len(moments.mean) // 2
        weight, bias = ridge_fit(moments.tensors(), size, self.ridge, biased=True)
        dtype = next(self.net.parameters()).dtype
        channels = channels_of(self.net.get_submodule(block))
        return LinearReplacement(weight.to(dtype), bias.to(dtype), channels)

    def _evaluate(self, images: Tensor) -> None:
        """Add the error of the features with each group replaced."""
        if self.latency_repeats and not self._savings:
            groups = [*self.groups.values()]
            self._savings = latency_shares(self.net, groups, images, self.latency_repeats)
        self._seen += len(images)
        target = self.net.forward_features(images)  # type: ignore[operator]
        for position, (block, replacement) in enumerate(self._replacements.items()):
            others = {other: Skip() for other in self.groups[block][1:]}
            with adapted(self.net, {block: replacement, **others}, {}):
                features = self.net.forward_features(images)  # type: ignore[operator]
            self._errors[position] += len(images) * float(F.mse_loss(features, target))

    def evidence(self) -> Evidence:
        """Return the scores; empty where no image was seen."""
        return as_evidence(self.scores, [*self.groups])


@contextmanager
def _captured(
    net: nn.Module, groups: Mapping[str, Group]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record, by its first block, what enters and what leaves each group while `net` runs."""
    entered: dict[str, Tensor] = {}
    flows: dict[str, tuple[Tensor, Tensor]] = {}

    def on_entry(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            entered[block] = args[0]

        return hook

    def on_exit(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            flows[block] = entered[block], output

        return hook

    handles = []
    for block, group in groups.items():
        handles.append(net.get_submodule(block).register_forward_pre_hook(on_entry(block)))
        handles.append(net.get_submodule(group[-1]).register_forward_hook(on_exit(block)))
    try:
        yield flows
    finally:
        for handle in handles:
            handle.remove()
