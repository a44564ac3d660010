"""Least squares in place of training: cut layers are solved on the compact network's activations.

Branch by branch (sequential, error-correcting regression), the Linear that consumes the kept units
is solved again: from the compact network's own units x_S and a constant to the dense stream after
the branch minus the compact stream before it, so that each branch also corrects the error of the
branches before it. Layers that consume value dims stay as they were folded: regressing them as well
made every network that we tried worse (ViT-Ti, a fifth of its MACs removed from MLPs, qk and v:
73.2 % against 74.8 %). In the end the classifier's input is mapped towards the dense network's, and
that map is folded into the classifier.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, MomentsError, full_precision
from vitrim.closed_form.reconstruction import ridge_fit
from vitrim.network import stream, structure
from vitrim.network.factored import widths_of_layer
from vitrim.network.stream import BranchStep
from vitrim.network.structure import Layer
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import (
    IMAGES,
    Sampling,
    capture,
    classifiers,
    fingerprints,
    gather_tokens,
)
from vitrim.trainer.phase import ResumePoint

_log = logging.getLogger(__name__)


class Refit(LightningModule):
    """Solve the cut layers of `net` one after the other, in one pass over the branches.

    The images must be those of the calibration that made `evidence`, in the same order: its targets
    replace the dense network. Other images, or another order, are an error. The compact stream is
    kept in memory, images x tokens x D numbers. `branches`, if given, are those to solve, cut or
    not.

    Raises:
        MomentsError: the evidence does not say of which images its targets are.
    """

    epochs = 2
    resumes_at: ResumePoint = "never"
    clip_norm = 0.0
    trains = False

    def __init__(
        self,
        net: nn.Module,
        *,
        evidence: Evidence,
        sampling: Sampling,
        ridge: float,
        closing_ridge: float,
        branches: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.calibration_images = sampling.images
        self.sampling = sampling
        self.ridge = ridge
        self.closing_ridge = closing_ridge
        self._stream = stream(net)
        self._targets = {
            name: statistics["target"]
            for name, statistics in evidence.moments.items()
            if "target" in statistics
        }
        self._numbers = evidence.moments.get(IMAGES, {}).get("fingerprint", torch.empty(0))
        if self._targets and not len(self._numbers):
            raise MomentsError("the targets of a regression do not say of which images they are")
        self._seen = [0] * self.epochs
        self._consumers = {
            layer.branch: layer
            for layer in structure(net).layers
            if layer.name in self._targets
            and (
                layer.branch in branches if branches is not None else _is_cut(net, layer, evidence)
            )
        }
        self._streams: list[Tensor] = []
        self._features: dict[str, list[Tensor]] = {}

    def on_train_start(self) -> None:
        """Set the network to eval mode, in which it is used."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained by gradient."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Embed a batch of images (B, C, H, W); in the second epoch, gather its final features."""
        self.observe(batch[0], self.current_epoch)

    def on_train_epoch_end(self) -> None:
        """Solve the layers; after the second epoch, the classifier."""
        self.solve(self.current_epoch)

    @torch.no_grad()
    def observe(self, images: Tensor, epoch: int) -> None:
        """Do `training_step` without a Trainer.

        Raises:
            MomentsError: these are not the images that were seen at this place in the calibration.
        """
        self._check_order(images, epoch)
        heads = [name for name, _ in classifiers(self.net) if name in self._targets]
        with full_precision(images):
            if epoch == 0:
                self._streams.append(self._stream.embed(images))
                return
            with capture(self.net, [(name, False) for name in heads]) as activations:
                self.net(images)
        for name in heads:
            self._features.setdefault(name, []).append(activations[name].float())

    def _check_order(self, images: Tensor, epoch: int) -> None:
        """Raise MomentsError unless these images come next in the calibration."""
        first = self._seen[epoch]
        self._seen[epoch] += len(images)
        expected, found = self._numbers[first : self._seen[epoch]].cpu(), fingerprints(images)
        same = len(expected) == len(found) and torch.allclose(found, expected, 1e-9, 1e-6)
        if self._targets and not same:
            raise MomentsError(
                f"images {first} to {self._seen[epoch] - 1} of the regression are not those of the "
                "calibration, or not in its order: both must be of one sampling of the same data"
            )

    @torch.no_grad()
    def solve(self, epoch: int) -> None:
        """Do `on_train_epoch_end` without a Trainer.

        Raises:
            MomentsError: fewer images were seen than in the calibration.
        """
        if self._targets and self._seen[epoch] != len(self._numbers):
            raise MomentsError(
                f"the regression saw {self._seen[epoch]} images, the calibration "
                f"{len(self._numbers)}: both must be of one sampling of the same data"
            )
        with full_precision(next(self.net.parameters())):
            if epoch == 0:
                self._solve_layers()
            else:
                for name, chunks in self._features.items():
                    self._solve_classifier(name, torch.cat(chunks))
                self._features = {}

    def _solve_layers(self) -> None:
        for step in self._stream.steps:
            if isinstance(step, BranchStep) and step.name in self._consumers:
                self._solve_layer(step, self._consumers[step.name])
            self._streams = [step.advance(x) for x in self._streams]
        self._streams = []

    def _solve_layer(self, branch: BranchStep, layer: Layer) -> None:
        """Set weight and bias of `layer` to the solution of the regression."""
        linear = self.net.get_submodule(layer.name)
        weight, bias = linear.get_parameter("weight"), linear.bias
        dims, units = weight.shape
        moments = Moments(layer.name, units + dims)
        seen = 0
        for x in self._streams:
            index = self.sampling.index(x, self._stream.n_prefix_tokens, seen)
            target = self._targets[layer.name][seen : seen + len(x)].to(x)
            seen += len(x)
            with capture(self.net, [(layer.name, False)]) as activations:
                branch.apply(x)
            before = gather_tokens(x, index)
            kept = gather_tokens(branch.tokens(activations[layer.name]), index)
            rows = torch.cat([kept, target - before], dim=-1)
            weights = self.sampling.weights(
                target, self._stream.n_prefix_tokens, self._stream.n_readout_tokens
            )
            moments.add(rows.flatten(0, 1), weights.flatten())
        moments.finish()
        solution, offset = ridge_fit(moments.tensors(), units, self.ridge, biased=bias is not None)
        if branch.scale is not None:
            scale = branch.scale.double().cpu()
            safe = torch.where(scale == 0, torch.inf, scale)
            solution, offset = solution / safe[:, None], offset / safe
        weight.copy_(solution)
        if isinstance(bias, Tensor):
            bias.copy_(offset)
        _log.debug("%s: refitted on %d images", layer.name, seen)

    def _solve_classifier(self, name: str, features: Tensor) -> None:
        """Map the classifier's input towards the dense one, by a ridge around the identity."""
        target = self._targets[name].to(features)
        size = features.shape[-1]
        moments = Moments(name, 2 * size)
        ones = torch.ones(len(target)).to(target)
        moments.add(torch.cat([features, target - features], dim=-1), ones)
        fold_map(self.net.get_submodule(name), moments, self.closing_ridge)


def add_solution(layer: nn.Module, moments: Moments, ridge: float) -> None:
    """Add to a Linear the regression of its errors on its inputs, in place.

    Args:
        layer: W (out, in).
        moments: of rows with the inputs first and the errors of the outputs after them.
        ridge: relative to the mean variance of the inputs.
    """
    weight, bias = layer.get_parameter("weight"), layer.bias
    moments.finish()
    change, offset = ridge_fit(moments.tensors(), weight.shape[1], ridge, biased=bias is not None)
    weight.add_(change.to(weight))
    if isinstance(bias, Tensor):
        bias.add_(offset.to(bias))


def fold_map(layer: nn.Module, moments: Moments, ridge: float) -> None:
    """Fold a regression of what the inputs of a Linear lack on these inputs into it, in place.

    Args:
        layer: W (out, in).
        moments: of rows with the inputs first and what they lack after them.
        ridge: relative to the mean variance of the inputs: the map is one around the identity.
    """
    moments.finish()
    weight = layer.get_parameter("weight").double().cpu()
    solution, offset = ridge_fit(moments.tensors(), weight.shape[1], ridge, biased=True)
    layer.get_parameter("weight").copy_(weight + weight @ solution)
    if isinstance(layer.bias, Tensor):
        layer.bias.add_((weight @ offset).to(layer.bias))


def _is_cut(net: nn.Module, layer: Layer, evidence: Evidence) -> bool:
    """Whether the layer consumes fewer units than at calibration."""
    calibrated = len(evidence.moments[layer.name]["mean"])
    width = widths_of_layer(net.get_submodule(layer.name))[0]
    if width > calibrated:
        raise MomentsError(f"{layer.name} consumes more units than in the calibrated network")
    return width < calibrated
