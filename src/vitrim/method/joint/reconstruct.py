"""After the cut: MLPs are solved again on the compact network's stream, then the classifier.

Branch by branch (sequential, error-correcting regression), the last layer of an MLP changes by what
brings the compact stream after the branch nearest to the dense one, so that each also corrects the
errors of those before it, of attentions too. Then, if asked for, the MLP's layers are trained by
gradient towards the same target. In the end the classifier's input is mapped towards the dense
network's, and that map is folded into the classifier.
"""

from __future__ import annotations

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, full_precision
from vitrim.closed_form.reconstruction import ridge_fit
from vitrim.method.joint.local import Rows, joined, train
from vitrim.method.joint.settings import LocalTraining
from vitrim.network import stream, structure
from vitrim.network.stream import BranchStep, Stream
from vitrim.trainer.calibrate import Sampling, capture, classifiers, gather_tokens
from vitrim.trainer.phase import ResumePoint


class Reconstruct(LightningModule):
    """Solve, and train, the MLPs of `net` towards the stream of `teacher`, then the classifier.

    Both streams are held in memory: twice images x tokens x D numbers.

    Args:
        net: the compact network.
        teacher: the dense network.
        sampling: which tokens the regression sees.
        ridge: of the regressions, relative to the mean variance of their inputs; a layer stays near
            its weights.
        closing_ridge: of the regression of the classifier's input.
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
        ridge: float,
        closing_ridge: float,
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
        self._stream = stream(net)
        self._ends = ends_of_mlps(net)
        self._dense: list[Tensor] = []
        self._compact: list[Tensor] = []
        self.errors: dict[str, list[float]] = {}

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
            self._dense.append(stream(self._teacher[0]).embed(images))
            self._compact.append(self._stream.embed(images))

    def on_train_epoch_end(self) -> None:
        """Solve branch by branch, then the classifier."""
        self.solve()

    @torch.no_grad()
    def solve(self) -> None:
        """Do `on_train_epoch_end` without a Trainer."""
        names, own_steps = {step.name for step in self._stream.branches}, iter(self._stream.steps)
        with full_precision(self._dense[0]):
            for dense in stream(self._teacher[0]).steps:
                self._dense = [dense.advance(x) for x in self._dense]
                if isinstance(dense, BranchStep) and dense.name not in names:
                    continue  # the branch was dropped
                own = next(own_steps)
                if isinstance(own, BranchStep) and own.name in self._ends:
                    self._solve_branch(own, self._ends[own.name])
                self._compact = [own.advance(x) for x in self._compact]
            self._close()
        self._dense, self._compact = [], []

    def _solve_branch(self, branch: BranchStep, name: str) -> None:
        """Add to layer `name` what brings the stream after `branch` nearest to the dense one."""
        layer = self.net.get_submodule(name)
        weight, bias = layer.get_parameter("weight"), layer.bias
        width = weight.shape[1]
        moments = Moments(name, width + len(weight))
        rows: list[Rows] = []
        n_seen = 0
        for x, dense in zip(self._compact, self._dense, strict=True):
            index = self.sampling.index(x, self._stream.n_prefix_tokens, n_seen)
            n_seen += len(x)
            with capture(self.net, [(name, False)]) as activations:
                after = branch.advance(x)
            target = gather_tokens(dense, index)
            error = branch.unscaled(target - gather_tokens(after, index))
            weights = self.sampling.weights(
                target, self._stream.n_prefix_tokens, self._stream.n_readout_tokens
            )
            inputs = gather_tokens(branch.tokens(activations[name]), index)
            moments.add(torch.cat([inputs, error], dim=-1).flatten(0, 1), weights.flatten())
            if self.local.epochs:
                rows.append(Rows(gather_tokens(x, index), target, weights))
        moments.finish()
        change, offset = ridge_fit(moments.tensors(), width, self.ridge, biased=bias is not None)
        weight.add_(change.to(weight))
        if isinstance(bias, Tensor):
            bias.add_(offset.to(bias))
        if rows:
            self._train(branch, joined(rows))

    def _train(self, branch: BranchStep, rows: Rows) -> None:
        """Train the layers of `branch` by themselves."""
        parameters = [
            parameter
            for layer in structure(self.net).layers
            if layer.branch == branch.name
            for parameter in self.net.get_submodule(layer.name).parameters()
        ]
        inner = [1] * (self._compact[0].ndim - 2)

        def advance(x_nD: Tensor) -> Tensor:
            return branch.advance(x_nD.reshape(len(x_nD), *inner, -1)).flatten(0, -2)

        self.errors[branch.name] = train(parameters, advance, rows, self.local)

    def _close(self) -> None:
        """Map the classifier's input towards the dense one, by a ridge around the identity."""
        teacher = self._teacher[0]
        heads = [*classifiers(self.net)]
        if not heads or not self._stream.norm_is_features:
            return
        for name, linear in heads:
            width = linear.in_features
            moments = Moments(name, 2 * width)
            for dense, compact in zip(self._dense, self._compact, strict=True):
                target = _input_of(teacher, name, stream(teacher), dense)
                features = _input_of(self.net, name, self._stream, compact)
                ones = torch.ones(len(features), device=features.device)
                moments.add(torch.cat([features, target - features], dim=-1), ones)
            moments.finish()
            solution, offset = ridge_fit(moments.tensors(), width, self.closing_ridge, biased=True)
            weight = linear.weight.detach().double().cpu()
            linear.weight.copy_(weight + weight @ solution)
            if linear.bias is not None:
                linear.bias.add_((weight @ offset).to(linear.bias))


def _input_of(net: nn.Module, layer: str, described: Stream, x: Tensor) -> Tensor:
    """Return what the layer in the head of `net` reads if the final stream is x."""
    with capture(net, [(layer, False)]) as activations:
        net.forward_head(described.features(net, x, len(described.steps)))  # type: ignore[operator]
    return activations[layer].float()


def ends_of_mlps(net: nn.Module) -> dict[str, str]:
    """Return, by branch, the path of the layer by which an MLP adds to the stream."""
    described = structure(net)
    attentions = {attention.branch for attention in described.attentions}
    return {
        layer.branch: layer.name
        for layer in described.layers
        if layer.branch not in attentions
        and all(part.site is None for part in layer.out)
        and not (layer.factor and layer.name.endswith(".down"))
    }
