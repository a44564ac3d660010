"""Least squares for low-rank layers: each second factor learns from what the network has become.

Branch by branch (sequential, error-correcting regression), with z the rank's activations in the
compact network, the layer that ends a branch is solved towards the dense stream after the branch
minus the compact stream before it, so that each branch also mends what went wrong before. Layers
inside a branch are solved towards the dense layer's own outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.compensation import regress
from vitrim.model import stream, structure
from vitrim.model.lowrank import low_rank_layers
from vitrim.model.stream import Branch
from vitrim.moments import Moments
from vitrim.trainer.calibrate import Sampling, full_precision, take, watch

_log = logging.getLogger(__name__)


class Regress(LightningModule):
    """Solve the second factors of `net` one after the other, `teacher` running beside it.

    Both streams are held in memory meanwhile: twice images x tokens x D numbers. Nothing is
    trained; `ridge`, relative to the mean variance of z, holds a factor at what it was.
    """

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
        """Walk through the branches and solve the low-rank layers."""
        pairs = zip(stream(self._teacher[0]).branches, self._stream.branches, strict=True)
        with full_precision(self._dense[0]):
            for dense, compact in pairs:
                self._walk(dense, compact)
        self._dense, self._compact = [], []

    def _walk(self, dense: Branch, compact: Branch) -> None:
        """Solve the layers of one branch and let both streams through it."""
        layers = [*low_rank_layers(self.net, compact.name)]
        outputs = self._through(dense, [whole for _, whole, _ in layers])
        ends = {
            layer.name
            for layer in structure(self._teacher[0]).layers
            if all(part.site is None for part in layer.out)
        }
        for name, whole, start in layers:
            width = self.net.get_submodule(name).out_features
            if whole in ends:
                aims = [
                    self._sampled(x, place) - self._sampled(mine, place)
                    for place, (x, mine) in enumerate(zip(self._dense, self._compact, strict=True))
                ]
                self._solve(compact, name, aims, compact.scale)
            elif self.net.get_submodule(whole).out_features == outputs[whole][0].shape[-1]:
                aims = [output[..., start : start + width] for output in outputs[whole]]  # type: ignore[operator]
                self._solve(compact, name, aims, None)
            else:
                _log.info("%s keeps its factors: the dense layer has other outputs", name)
        self._compact = [x + compact.apply(x) for x in self._compact]

    def _through(self, branch: Branch, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Let the dense stream through; return what its layers `names` gave, at sampled tokens."""
        outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        for place, x in enumerate(self._dense):
            with watch(self._teacher[0], [(name, True) for name in outputs]) as flows:
                self._dense[place] = x + branch.apply(x)
            for name, found in outputs.items():
                found.append(self._sampled(flows[name], place))
        return outputs

    def _solve(
        self, branch: Branch, name: str, aims: Sequence[Tensor], scale: Tensor | None
    ) -> None:
        """Add to the second factor of layer `name` what brings its outputs nearest to `aims`."""
        up = self.net.get_submodule(name).get_submodule("up")
        weight, bias = up.get_parameter("weight"), up.bias
        rank = weight.shape[1]
        moments = Moments(name, rank + len(weight))
        for place, (x, aim) in enumerate(zip(self._compact, aims, strict=True)):
            with watch(self.net, [(f"{name}.up", False)]) as flows:
                branch.apply(x)
            z = self._sampled(flows[f"{name}.up"], place)
            wanted = aim if scale is None else aim / torch.where(scale == 0, torch.inf, scale)
            weights = torch.ones(z.shape[:2], device=z.device)
            weights[:, : self._stream.readout] = self.sampling.readout
            rows = torch.cat([z, wanted - up(z)], dim=-1)
            moments.add(rows.flatten(0, 1), weights.flatten())
        moments.finish()
        cov, mean = moments.cov.double(), moments.mean
        if bias is None:  # no constant: the regression goes through the origin
            cov = cov + torch.outer(mean, mean)
        taken = regress(cov[:rank, :rank], cov[:rank, rank:], self.ridge).T
        weight.add_(taken.to(weight))
        if isinstance(bias, Tensor):
            bias.add_((mean[rank:] - taken @ mean[:rank]).to(bias))

    def _sampled(self, x: Tensor, place: int) -> Tensor:
        """Return the sampled tokens of batch number `place`, (B, n, C)."""
        seen = sum(len(batch) for batch in self._compact[:place])
        number = seen + torch.arange(len(x), device=x.device)
        return take(x, self.sampling.index(x.shape[1], self._stream.prefix, number))
