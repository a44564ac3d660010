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
from collections.abc import Collection, Sequence

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, full_precision
from vitrim.closed_form.reconstruction import ridge_fit
from vitrim.network import stream, structure
from vitrim.network.factored import widths_of_layer
from vitrim.network.stream import BranchStep, paired_steps
from vitrim.trainer.activations import capture
from vitrim.trainer.calibrate import Sampling, classifiers, gather_tokens
from vitrim.trainer.phase import ResumePoint

_log = logging.getLogger(__name__)


class Refit(LightningModule):
    """Solve the cut layers of `net` one after the other, in one pass over the branches.

    The stream of `teacher` is computed next to that of `net`, on the same batches: both are in
    memory, twice images x tokens x D numbers. The second epoch maps the classifier's input, and
    keeps images x D numbers.

    Args:
        net: the compact network; its layers get new weights.
        teacher: the dense network.
        sampling: which tokens are seen.
        ridge: of the regression of a layer, relative to the mean variance of its inputs.
        closing_ridge: of the regression of the classifier's input, around the identity.
        branches: whose last layers are solved, cut or not. None: all that read fewer hidden units
            than in `teacher`.
    """

    epochs = 2
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
        branches: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.calibration_images = sampling.images
        self.sampling = sampling
        self.ridge = ridge
        self.closing_ridge = closing_ridge
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module
        self._stream = stream(net)
        readers = _readers_of_hidden_units(net)
        self._consumers = {
            branch: name
            for branch, name in readers.items()
            if (branch in branches if branches is not None else _is_cut(net, teacher, name))
        }
        self._classifiers = [name for name, _ in classifiers(net)]
        self._dense: list[Tensor] = []
        self._compact: list[Tensor] = []
        self._features: dict[str, list[Tensor]] = {name: [] for name in self._classifiers}

    def on_train_start(self) -> None:
        """Set both networks to eval mode, in which they are used."""
        self.net.eval()
        self._teacher[0].to(self.device).eval()

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
        """Do `training_step` without a Trainer."""
        teacher = self._teacher[0]
        with full_precision(images):
            if epoch == 0:
                self._dense.append(stream(teacher).embed(images))
                self._compact.append(self._stream.embed(images))
                return
            found, wanted = (
                _inputs_of(net, self._classifiers, images) for net in (self.net, teacher)
            )
        for name, chunks in self._features.items():
            chunks.append(torch.cat([found[name], wanted[name] - found[name]], dim=-1))

    @torch.no_grad()
    def solve(self, epoch: int) -> None:
        """Do `on_train_epoch_end` without a Trainer."""
        with full_precision(next(self.net.parameters())):
            if epoch == 0:
                self._solve_layers()
                return
            for name, chunks in self._features.items():
                self._solve_classifier(name, torch.cat(chunks))
        self._features = {}

    def _solve_layers(self) -> None:
        for dense, own in paired_steps(stream(self._teacher[0]), self._stream):
            self._dense = [dense.advance(x) for x in self._dense]
            if own is None:
                continue
            if isinstance(own, BranchStep) and own.name in self._consumers:
                self._solve_layer(own, self._consumers[own.name])
            self._compact = [own.advance(x) for x in self._compact]
        self._dense, self._compact = [], []

    def _solve_layer(self, branch: BranchStep, layer: str) -> None:
        """Set weight and bias of `layer` to the solution of the regression."""
        linear = self.net.get_submodule(layer)
        weight, bias = linear.get_parameter("weight"), linear.bias
        dims, units = weight.shape
        moments = Moments(layer, units + dims)
        seen = 0
        for x, dense in zip(self._compact, self._dense, strict=True):
            index = self.sampling.index(x, self._stream.n_prefix_tokens, seen)
            target = gather_tokens(dense, index).float()
            seen += len(x)
            with capture(self.net, [(layer, False)]) as activations:
                branch.apply(x)
            before = gather_tokens(x, index)
            kept = gather_tokens(branch.tokens(activations[layer]), index)
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
        _log.debug("%s: refitted on %d images", layer, seen)

    def _solve_classifier(self, name: str, rows: Tensor) -> None:
        """Map the classifier's input towards the dense one, by a ridge around the identity."""
        moments = Moments(name, rows.shape[-1])
        moments.add(rows, torch.ones(len(rows), device=rows.device))
        fold_map(self.net.get_submodule(name), moments, self.closing_ridge)


def _inputs_of(net: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Return what the named layers read for images (B, C, H, W), in float32."""
    with capture(net, [(name, False) for name in layers]) as activations:
        net(images)
    return {name: activations[name].float() for name in layers}


def _readers_of_hidden_units(net: nn.Module) -> dict[str, str]:
    """Return, by branch, the path of the layer whose inputs are hidden units, one each."""
    described = structure(net)
    hidden = {name for name, site in described.sites.items() if site.kind == "hidden"}
    return {
        layer.branch: layer.name
        for layer in described.layers
        if not layer.gathers and any(part.site in hidden for part in layer.inp)
    }


def _is_cut(net: nn.Module, dense: nn.Module, layer: str) -> bool:
    """Whether a layer of `net` reads fewer units than in `dense`."""
    own, whole = (widths_of_layer(each.get_submodule(layer))[0] for each in (net, dense))
    return own < whole


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
