"""After the cut: each MLP is brought near the dense stream by itself, then the classifier.

MLP by MLP, on the compact network's own stream: the layers are trained by gradient towards the
dense stream after the MLP, so that each also corrects the errors of the branches before it, of
attentions too. With a ridge, the last layer is first solved by least squares towards the same
target (sequential, error-correcting regression). In the end the classifier's input can be mapped
towards the dense network's by a ridge regression, which is folded into the classifier.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, full_precision
from vitrim.method.joint.local import Rows, joined, train
from vitrim.method.joint.settings import LocalTraining
from vitrim.network import stepwise, structure
from vitrim.network.factored import widths_of_layer
from vitrim.network.stream import BranchStep, Stream, paired_steps
from vitrim.network.structure import ends_of
from vitrim.trainer.activations import capture
from vitrim.trainer.calibrate import Sampling, classifiers, gather_tokens
from vitrim.trainer.phase import ResumePoint
from vitrim.trainer.refit import add_solution, fold_map

_log = logging.getLogger(__name__)


class Reconstruct(LightningModule):
    """Bring the MLPs of `net` near the stream of `teacher`, then its classifier.

    Both streams are held in memory: twice images x tokens x D numbers.

    Args:
        net: the compact network.
        teacher: the dense network.
        sampling: which tokens are seen.
        ridge: of the regression of an MLP's last layer, relative to the mean variance of its
            inputs; it stays near its weights. None: there is no regression.
        closing_ridge: of the regression of the classifier's input; None: there is none.
        local: the training of each MLP.
    """

    epochs = 1
    resumes_at: ResumePoint = "never"
    clip_norm = 0.0
    trains = False

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        *,
        sampling: Sampling,
        ridge: float | None,
        closing_ridge: float | None,
        local: LocalTraining,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.calibration_images = sampling.images
        self.sampling = sampling
        self.ridge = ridge
        self.closing_ridge = closing_ridge
        self.local = local
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module
        self._stream = stepwise(net)
        self._ends = ends_of_mlps(net)
        self._dense: list[Tensor] = []
        self._compact: list[Tensor] = []

    def on_train_start(self) -> None:
        """Run both networks in evaluation mode."""
        self.net.eval()
        self._teacher[0].to(self.device).eval()

    def configure_optimizers(self) -> None:
        """Return none: the layers are solved, or trained one after the other by this module."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Embed a batch of images (B, C, H, W) with both networks."""
        self.observe(batch[0])

    @torch.no_grad()
    def observe(self, images: Tensor) -> None:
        """Do `training_step` without a Trainer."""
        with full_precision(images):
            self._dense.append(stepwise(self._teacher[0]).embed(images))
            self._compact.append(self._stream.embed(images))

    def on_train_epoch_end(self) -> None:
        """Solve branch by branch, then the classifier."""
        self.solve()

    @torch.no_grad()
    def solve(self) -> None:
        """Do `on_train_epoch_end` without a Trainer."""
        with full_precision(self._dense[0]):
            for dense, own in paired_steps(stepwise(self._teacher[0]), self._stream):
                self._dense = [dense.advance(x) for x in self._dense]
                if own is None:
                    continue
                if isinstance(own, BranchStep) and own.name in self._ends:
                    self._correct(own, self._ends[own.name])
                self._compact = [own.advance(x) for x in self._compact]
            if self.closing_ridge is not None:
                self._close(self.closing_ridge)
        self._dense, self._compact = [], []

    def _correct(self, branch: BranchStep, end: str) -> None:
        """Solve and train `branch`, whose last layer is `end`, as far as it is asked for."""
        if self.ridge is not None:
            self._solve(branch, end, self.ridge)
        if self.local.epochs:
            self._train(branch)

    def _solve(self, branch: BranchStep, end: str, ridge: float) -> None:
        """Add to the layer `end` what brings the stream after `branch` nearest to the dense one."""
        layer = self.net.get_submodule(end)
        moments = Moments(end, sum(widths_of_layer(layer)))
        for x, index, rows in self._batches():
            with capture(self.net, [(end, False)]) as activations:
                branch.apply(x)
            inputs = gather_tokens(branch.tokens(activations[end]), index)
            after = rows.before + branch.added(layer(inputs))
            error = branch.unscaled(rows.target - after)
            both = torch.cat([inputs, error], dim=-1)
            moments.add(both.flatten(0, 1), rows.weights.flatten())
        add_solution(layer, moments, ridge)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Rows]]:
        """Iterate over batches: the compact stream, which tokens are sampled, and these."""
        n_seen = 0
        for x, dense in zip(self._compact, self._dense, strict=True):
            index = self.sampling.index(x, self._stream.n_prefix_tokens, n_seen)
            n_seen += len(x)
            target = gather_tokens(dense, index)
            weights = self.sampling.weights(
                target, self._stream.n_prefix_tokens, self._stream.n_readout_tokens
            )
            before = gather_tokens(x, index)
            yield x, index, Rows(before, before, target, weights)

    def _train(self, branch: BranchStep) -> None:
        """Train the layers of `branch` by themselves, on what its pointwise part reads."""
        parameters = [
            parameter
            for layer in structure(self.net).layers
            if layer.branch == branch.name
            for parameter in self.net.get_submodule(layer.name).parameters()
        ]
        inner = [1] * (self._compact[0].ndim - 2)
        last = self.net.get_submodule(branch.pointwise) if branch.pointwise else None

        def advance(rows: Rows) -> Tensor:
            x = rows.inputs.reshape(len(rows.inputs), *inner, -1)
            added = branch.apply(x) if last is None else branch.added(last(x))
            return rows.before + added.flatten(0, -2)

        rows = joined([_with_inputs(self.net, branch, *batch) for batch in self._batches()])
        errors = train(parameters, advance, rows, self.local)
        if errors:
            _log.debug("%s: held-out error %.4g, at best %.4g", branch.name, errors[0], min(errors))

    def _close(self, ridge: float) -> None:
        """Map the classifier's input towards the dense one, by a ridge around the identity."""
        teacher = self._teacher[0]
        dense_stream = stepwise(teacher)
        heads = [*classifiers(self.net)]
        if not heads or not self._stream.norm_is_features:
            return
        for name, linear in heads:
            moments = Moments(name, 2 * linear.in_features)
            for dense, compact in zip(self._dense, self._compact, strict=True):
                target = _input_of(teacher, name, dense_stream, dense)
                features = _input_of(self.net, name, self._stream, compact)
                ones = torch.ones(len(features), device=features.device)
                moments.add(torch.cat([features, target - features], dim=-1), ones)
            fold_map(linear, moments, ridge)


def _with_inputs(net: nn.Module, branch: BranchStep, x: Tensor, index: Tensor, rows: Rows) -> Rows:
    """Return sampled tokens with what the pointwise part of `branch` reads at them."""
    if not branch.pointwise:
        return rows
    with capture(net, [(branch.pointwise, False)]) as activations:
        branch.apply(x)
    return rows._replace(inputs=gather_tokens(activations[branch.pointwise], index))


def _input_of(net: nn.Module, layer: str, described: Stream, x: Tensor) -> Tensor:
    """Return what the layer in the head of `net` reads if the final stream is x."""
    with capture(net, [(layer, False)]) as activations:
        net.forward_head(described.features(net, x, len(described.steps)))  # type: ignore[operator]
    return activations[layer].float()


def ends_of_mlps(net: nn.Module) -> dict[str, str]:
    """Return, by branch, the path of the Linear by which an MLP adds to the stream."""
    described = structure(net)
    attentions = {attention.branch for attention in described.attentions}
    return {
        branch: name
        for branch, name in ends_of(described).items()
        if branch not in attentions and net.get_parameter(f"{name}.weight").ndim == 2
    }
