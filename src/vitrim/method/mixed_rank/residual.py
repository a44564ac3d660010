"""Error compensation of low-rank layers by gradient: a residual of its own rank, merged at the end.

After the mixed-rank paper (arXiv 2402.06004): W_r + A B, with W_r as it was decomposed. The two
thin factors are trained on calibration images against the layer's normalised output error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from vitrim.closed_form.moments import full_precision, key_of
from vitrim.network import stream
from vitrim.network.attention import GatheredLinear
from vitrim.network.factored import LowRankLinear, low_rank_layers
from vitrim.trainer.activations import capture
from vitrim.trainer.calibrate import Sampling, gather_tokens
from vitrim.trainer.phase import ResumePoint
from vitrim.trainer.recipe import Recipe, adamw_cosine


class _DenseTwin(NamedTuple):
    """Where the outputs of a low-rank layer are in the dense network.

    `layer` is the path of the dense layer, `start` the first of its outputs that correspond;
    `tokens` maps activations of the branch to the order of the stream's tokens.
    """

    layer: str
    start: int
    tokens: Callable[[Tensor], Tensor]


class Residual(LightningModule):
    """Train the last `rank` components of every low-rank layer of `net`, all layers at once.

    The loss of a layer is E ||W x + b - f(x')||^2 / ||W x + b||^2 over sampled tokens: x is the
    input of the dense layer in `teacher`, x' that of the layer in `net` as trained so far, and no
    gradient flows between layers. The residual starts as the components in its place; where these
    are zero, A starts at zero and B at random. A layer keeps at least one component as it was.
    Layers whose dense twin has other outputs are not trained.
    """

    resumes_at: ResumePoint = "batch"
    trains = True

    def __init__(
        self, net: nn.Module, teacher: nn.Module, *, rank: int, sampling: Sampling, recipe: Recipe
    ) -> None:
        super().__init__()
        recipe.refuse("method.residual.training", "repeats", "keep")
        self.net = net
        self.recipe = recipe
        self.epochs = recipe.epochs
        self.clip_norm = recipe.clip_norm
        self.calibration_images = sampling.images
        self.sampling = sampling
        self._teacher = [teacher]  # in a list: neither saved nor trained with this module
        self._stream = stream(net)
        self._twins = {
            name: _DenseTwin(dense, start, branch.tokens)
            for branch in self._stream.branches
            for name, dense, start in low_rank_layers(net, branch.name)
            if _outputs(net, dense) == _outputs(teacher, dense)
        }
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name in self._twins:
            layer = self._layer(name)
            kept = layer.rank - min(rank, layer.rank - 1)
            a, b = (factor.detach() for factor in _factors(layer))
            noise = torch.randn(b[kept:].shape, generator=generator).to(b) * b.std()
            empty = ~b[kept:].any(dim=1, keepdim=True)
            self.a[key_of(name)] = nn.Parameter(a[:, kept:].clone())
            self.b[key_of(name)] = nn.Parameter(torch.where(empty, noise, b[kept:]))

    @property
    def ranks(self) -> int:
        """The number of components that are trained, over all layers."""
        return sum(len(b) for b in self.b.values())

    def _layer(self, name: str) -> LowRankLinear:
        layer = self.net.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        return layer

    def on_train_start(self) -> None:
        """Run both networks in evaluation mode."""
        self.net.eval()
        self._teacher[0].to(self.device).eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the sum of all layers' losses on a batch of images (B, C, H, W)."""
        self._merge()
        images = batch[0]
        inputs = [(f"{name}.down", False) for name in self._twins]
        dense_layers = dict.fromkeys((twin.layer, True) for twin in self._twins.values())
        with torch.no_grad(), full_precision(images):
            with capture(self._teacher[0], [*dense_layers]) as dense:
                self._teacher[0](images)
            with capture(self.net, inputs) as compact:
                self.net(images)
        losses = [
            self._loss(name, twin, dense[twin.layer], compact[f"{name}.down"])
            for name, twin in self._twins.items()
        ]
        loss = torch.stack(losses).sum()
        self.log("loss", loss)
        return loss

    def _loss(self, name: str, twin: _DenseTwin, dense: Tensor, compact: Tensor) -> Tensor:
        """Return the loss of one layer from the dense outputs and the compact inputs."""
        layer, x = self._layer(name), twin.tokens(compact)
        index = self.sampling.index(x, self._stream.n_prefix_tokens, 0)
        outputs = slice(twin.start, twin.start + layer.out_features)
        target = gather_tokens(twin.tokens(dense), index)[..., outputs]
        error = target - self._output(name, layer, gather_tokens(x, index))
        return (error.square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()

    def _output(self, name: str, layer: LowRankLinear, x_BnC: Tensor) -> Tensor:
        a, b = self.a[key_of(name)], self.b[key_of(name)]
        kept, (up, down) = layer.rank - len(b), _factors(layer)
        if isinstance(layer.down, GatheredLinear):
            x_BnC = x_BnC[..., layer.down.get_buffer("index")]
        main = F.linear(x_BnC, down[:kept]), up[:, :kept]
        return F.linear(*main, layer.up.bias) + F.linear(F.linear(x_BnC, b), a)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the cosine schedule of the recipe, for the residual alone."""
        self.net.requires_grad_(False)
        return adamw_cosine(self, self.recipe, self.trainer)

    def on_fit_end(self) -> None:
        """Merge what was trained into the network."""
        self._merge()
        self.net.requires_grad_()

    @torch.no_grad()
    def _merge(self) -> None:
        """Write the residual over the last components."""
        for name in self._twins:
            layer, a, b = self._layer(name), self.a[key_of(name)], self.b[key_of(name)]
            if len(b):
                up, down = _factors(layer)
                up[:, -len(b) :] = a
                down[-len(b) :] = b


def _factors(layer: LowRankLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weights of `up` (out, r) and `down` (r, in)."""
    return layer.up.get_parameter("weight"), layer.down.get_parameter("weight")


def _outputs(net: nn.Module, name: str) -> int:
    width: int = net.get_submodule(name).out_features  # type: ignore[assignment]
    return width
