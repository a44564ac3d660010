"""Least squares after factorising: the last layer of every branch is solved on the compact network.

Branch by branch (sequential, error-correcting regression), let z be the input of a branch's last
product in the compact network (the rank's activations, if that layer is in two factors). The
product is solved towards the dense stream after the branch minus the compact stream before it, so
each branch also corrects the errors of earlier ones. Layers inside branches keep their weights:
solving them towards the dense layers' own outputs made networks worse (ViT-Ti at 70 % of its
blocks' params: 53.5 % with fc2 alone, 20.9 % with fc1 as well).
"""

from __future__ import annotations

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, full_precision
from vitrim.network import stream, structure
from vitrim.network.factored import widths_of_layer
from vitrim.network.stream import BranchStep
from vitrim.network.structure import ends_of
from vitrim.trainer.activations import capture
from vitrim.trainer.calibrate import Sampling, gather_tokens
from vitrim.trainer.phase import ResumePoint
from vitrim.trainer.refit import add_solution


class Regress(LightningModule):
    """Solve the last product of every branch of `net` in order, towards the stream of `teacher`.

    Both streams are held in memory: twice images x tokens x D numbers. Nothing is trained; `ridge`,
    relative to the mean variance of z, keeps a layer near its weights before.
    """

    resumes_at: ResumePoint = "never"
    clip_norm = 0.0
    trains = False

    def __init__(
        self, net: nn.Module, teacher: nn.Module, *, sampling: Sampling, ridge: float
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.calibration_images = sampling.images
        self.sampling = sampling
        self.ridge = ridge
        self.epochs = 1
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module
        self._stream = stream(net)
        self._ends = ends_of(structure(net))
        self._dense: list[Tensor] = []
        self._compact: list[Tensor] = []

    def on_train_start(self) -> None:
        """Run both networks in evaluation mode."""
        self.net.eval()
        self._teacher[0].to(self.device).eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained by gradient."""

    @torch.no_grad()
    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Embed a batch of images (B, C, H, W) with both networks."""
        with full_precision(batch[0]):
            self._dense.append(stream(self._teacher[0]).embed(batch[0]))
            self._compact.append(self._stream.embed(batch[0]))

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Solve branch by branch."""
        pairs = zip(stream(self._teacher[0]).steps, self._stream.steps, strict=True)
        with full_precision(self._dense[0]):
            for dense, compact in pairs:
                self._dense = [dense.advance(x) for x in self._dense]
                if isinstance(compact, BranchStep):
                    self._solve(compact, self._ends[compact.name])
                self._compact = [compact.advance(x) for x in self._compact]
        self._dense, self._compact = [], []

    def _solve(self, branch: BranchStep, name: str) -> None:
        """Add to layer `name` what brings the stream after `branch` nearest to the dense one."""
        layer = self.net.get_submodule(name)
        moments, n_seen = Moments(name, sum(widths_of_layer(layer))), 0
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
            rows = torch.cat([inputs, error], dim=-1)
            moments.add(rows.flatten(0, 1), weights.flatten())
        add_solution(layer, moments, self.ridge)
