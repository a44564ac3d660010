"""Least squares after factorising: the layers that end branches learn from what the network is now.

Branch by branch (sequential, error-correcting regression), with z what enters the last product of a
branch in the compact network (the rank's activations, where that layer is in two factors), it is
solved towards the dense stream after the branch minus the compact stream before it: each branch
also mends what went wrong before. Layers inside branches stay: to solve them towards the dense
layers' own outputs as well made networks worse (ViT-Ti at 70 % of its blocks' params: 53.5 % with
fc2 alone, 20.9 % with fc1 besides).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments
from vitrim.closed_form.reconstruction import fitted
from vitrim.network import stream, structure
from vitrim.network.stream import Branch
from vitrim.trainer.calibrate import Sampling, full_precision, take, watch


class Regress(LightningModule):
    """Solve the last product of every branch of `net`, one after the other, `teacher` beside it.

    Both streams are held in memory meanwhile: twice images x tokens x D numbers. Nothing is
    trained; `ridge`, relative to the mean variance of z, holds a layer at what it was.
    """

    resumes_at = "never"

    def __init__(
        self, net: nn.Module, teacher: nn.Module, *, sampling: Sampling, ridge: float
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.samples = sampling.images
        self.sampling = sampling
        self.ridge = ridge
        self.epochs = 1
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module
        self._stream = stream(net)
        self._ends = _ends(net)
        self._dense: list[Tensor] = []
        self._compact: list[Tensor] = []

    def on_train_start(self) -> None:
        """Run both networks as they are used."""
        self.net.eval()
        self._teacher[0].to(self.device).eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained by gradient."""

    @torch.no_grad()
    def training_step(self, batch: Any, batch_index: int) -> None:
        """Embed a batch of images (B, C, H, W) by both networks."""
        with full_precision(batch[0]):
            self._dense.append(stream(self._teacher[0]).embed(batch[0]))
            self._compact.append(self._stream.embed(batch[0]))

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Walk through the branches and solve."""
        pairs = zip(stream(self._teacher[0]).steps, self._stream.steps, strict=True)
        with full_precision(self._dense[0]):
            for dense, compact in pairs:
                self._dense = [dense.advance(x) for x in self._dense]
                if isinstance(compact, Branch):
                    self._solve(compact, self._ends[compact.name])
                self._compact = [compact.advance(x) for x in self._compact]
        self._dense, self._compact = [], []

    def _solve(self, branch: Branch, name: str) -> None:
        """Add to layer `name` what brings the stream after `branch` nearest to the dense one."""
        layer = self.net.get_submodule(name)
        weight, bias = layer.get_parameter("weight"), layer.bias
        width = weight.shape[1]
        moments, seen = Moments(name, width + len(weight)), 0
        for x, dense in zip(self._compact, self._dense, strict=True):
            index = self.sampling.index(x, self._stream.prefix, seen)
            seen += len(x)
            with watch(self.net, [(name, False)]) as flows:
                after = branch.advance(x)
            aim = take(dense, index)
            off = aim - take(after, index)
            off = branch.unscaled(off)
            weights = self.sampling.weights(aim, self._stream.prefix, self._stream.readout)
            rows = torch.cat([take(branch.tokens(flows[name]), index), off], dim=-1)
            moments.add(rows.flatten(0, 1), weights.flatten())
        moments.finish()
        taken, offset = fitted(moments.tensors(), width, self.ridge, biased=bias is not None)
        weight.add_(taken.to(weight))
        if isinstance(bias, Tensor):
            bias.add_(offset.to(bias))


def _ends(net: nn.Module) -> dict[str, str]:
    """Return, by branch, the path of the Linear whose output is added to the stream."""
    return {
        layer.branch: layer.name
        for layer in structure(net).layers
        if all(part.site is None for part in layer.out)
        and not (layer.factor and layer.name.endswith(".down"))
    }
