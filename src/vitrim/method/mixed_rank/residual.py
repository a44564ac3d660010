"""Error compensation of low-rank layers by gradient: a residual of its own rank, merged at the end.

After the mixed-rank paper (arXiv 2402.06004): W_r + A B, with W_r as it was decomposed, and the two
thin factors trained on the proxy images against the layer's normalised output error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import key_of
from vitrim.network import stream
from vitrim.network.factored import LowRankLinear, low_rank_layers
from vitrim.trainer.calibrate import Sampling, full_precision, take, watch
from vitrim.trainer.recipe import Recipe, optimisation


class Residual(LightningModule):
    """Train the last `rank` components of every low-rank layer of `net`, all layers at once.

    The loss of a layer is E ||W x + b - f(x')||^2 / ||W x + b||^2 over sampled tokens: x enters the
    dense layer in `teacher`, x' the layer in `net` as trained so far, and no gradient runs from
    layer to layer. What is trained starts as what stands in its place; where that is nothing, with
    A at zero and B at random. A layer keeps at least one component as it was. Layers whose dense
    twin has other outputs are left alone.
    """

    def __init__(
        self, net: nn.Module, teacher: nn.Module, *, rank: int, sampling: Sampling, recipe: Recipe
    ) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.epochs = recipe.epochs
        self.samples = sampling.images
        self.sampling = sampling
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module
        self._stream = stream(net)
        self._layers = {
            name: (whole, start, branch.tokens)
            for branch in self._stream.branches
            for name, whole, start in low_rank_layers(net, branch.name)
            if _outputs(net, whole) == _outputs(teacher, whole)
        }
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name in self._layers:
            layer = self._layer(name)
            kept = layer.rank - min(rank, layer.rank - 1)
            a, b = (factor.detach() for factor in (layer.up.weight, layer.down.weight))
            noise = torch.randn(b[kept:].shape, generator=generator).to(b) * b.std()
            empty = ~b[kept:].any(dim=1, keepdim=True)
            self.a[key_of(name)] = nn.Parameter(a[:, kept:].clone())
            self.b[key_of(name)] = nn.Parameter(torch.where(empty, noise, b[kept:]))

    @property
    def ranks(self) -> int:
        """How many components are trained in all."""
        return sum(len(b) for b in self.b.values())

    def _layer(self, name: str) -> LowRankLinear:
        layer = self.net.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        return layer

    def on_train_start(self) -> None:
        """Run both networks as they are used."""
        self.net.eval()
        self._teacher[0].to(self.device).eval()

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the sum of all layers' losses on a batch of images (B, C, H, W)."""
        self._merge()
        images = batch[0]
        inputs = [(f"{name}.down", False) for name in self._layers]
        wholes = [(whole, True) for whole, *_ in self._layers.values()]
        with torch.no_grad(), full_precision(images):
            with watch(self._teacher[0], [*dict.fromkeys(wholes)]) as dense:
                self._teacher[0](images)
            with watch(self.net, inputs) as compact:
                self.net(images)
        losses = []
        for name, (whole, start, tokens) in self._layers.items():
            x = tokens(compact[f"{name}.down"])
            index = self.sampling.index(x, self._stream.prefix, 0)
            layer = self._layer(name)
            aim = take(tokens(dense[whole]), index)[..., start : start + layer.out_features]
            off = aim - self._output(name, layer, take(x, index))
            losses.append((off.square().sum(-1) / aim.square().sum(-1).clamp_min(1e-12)).mean())
        loss = torch.stack(losses).sum()
        self.log("loss", loss, prog_bar=True)
        return loss

    def _output(self, name: str, layer: LowRankLinear, x_BnC: Tensor) -> Tensor:
        a, b = self.a[key_of(name)], self.b[key_of(name)]
        kept = layer.rank - len(b)
        gathered = getattr(layer.down, "index", None)
        x_BnC = x_BnC if gathered is None else x_BnC[..., gathered]
        main = F.linear(x_BnC, layer.down.weight[:kept]), layer.up.weight[:, :kept]
        return F.linear(*main, layer.up.bias) + F.linear(F.linear(x_BnC, b), a)

    def configure_optimizers(self) -> Any:
        """Return AdamW and the cosine schedule of the recipe, for the residual alone."""
        self.net.requires_grad_(False)
        steps = int(self.trainer.estimated_stepping_batches)
        return optimisation(self, self.recipe, steps=steps)

    def on_fit_end(self) -> None:
        """Leave the network with what was trained."""
        self._merge()
        self.net.requires_grad_()

    @torch.no_grad()
    def _merge(self) -> None:
        """Put the residual in the place of the last components."""
        for name in self._layers:
            layer, a, b = self._layer(name), self.a[key_of(name)], self.b[key_of(name)]
            if len(b):
                layer.up.weight[:, -len(b) :] = a
                layer.down.weight[-len(b) :] = b


def _outputs(net: nn.Module, name: str) -> int:
    width: int = net.get_submodule(name).out_features  # type: ignore[assignment]
    return width
