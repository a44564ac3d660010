"""The scorer of low-rank methods: what enters each Linear, and how much its outputs matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, MomentsError, add_to, key_of
from vitrim.method.mixed_rank.metric import Metric
from vitrim.network import stream, structure
from vitrim.network.attention import GatheredLinear
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Sampling, full_precision, take, watch

_MOMENTS = ("whitening", "normalised_output", "centred", "loss")


class Piece(NamedTuple):
    """A layer, or a piece of one: the layer's path and the piece's rows, and its columns."""

    layer: str
    start: int
    rows: int
    columns: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the piece's rows of what has the layer's."""
        return tensor.detach()[self.start : self.start + self.rows]


class Profile(LightningModule):
    """Pass proxy images through a network once and keep what the metric of its layers needs.

    Evidence has no scores but `moments`, by layer: `weight`, `mean` and `cov` of its inputs (for
    normalised_output every token counts 1 / ||W x||^2), `abs` E|x| for asvd, `tokens` (N, in), the
    mean over images, for mean_input. With `loss_images` above 0 also, of the derivatives of the
    logits by its outputs, summed over logits and tokens and averaged over as many images, by random
    signs: `slope` (out,), their squares, and by piece `products`, G (out, out), or W^T G W (in, in)
    if that is smaller. All take the same memory whatever the number of images.
    """

    resumes_at = "never"

    images: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        pieces: Mapping[str, Piece],
        metric: Metric,
        sampling: Sampling,
        loss_images: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        layers = [*dict.fromkeys(piece.layer for piece in pieces.values())]
        self.epochs = 1 if layers else 0
        self.samples = sampling.images
        self.sampling = sampling
        self.metric = metric
        self.loss_images = loss_images
        self.settings: dict[str, Any] = {
            "pieces": {name: [*piece] for name, piece in pieces.items()},
            "metric": metric,
            "sampling": asdict(sampling),
            "loss_images": loss_images,
        }
        self._layers = layers
        self._pieces = dict(pieces) if loss_images else {}
        self._stream = stream(net)
        branches = {branch.name: branch for branch in self._stream.branches}
        self._tokens = {
            layer.name: branches[layer.branch].tokens for layer in structure(net).layers
        }
        self.moments = nn.ModuleDict()
        for name in layers:
            if metric in _MOMENTS:
                width: int = net.get_submodule(name).in_features  # type: ignore[assignment]
                self.moments[key_of(name)] = Moments(name, width)
            for what in self._sums():
                self.register_buffer(key_of(f"{name}.{what}"), torch.empty(0))
        for name in self._pieces:
            self.register_buffer(key_of(f"{name}.products"), torch.empty(0))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))
        self._seen = 0

    def _sums(self) -> list[str]:
        """Return what is kept of a layer beside moments."""
        own = {"asvd": ["abs"], "mean_input": ["tokens"]}.get(self.metric, [])
        return [*own, "slope"] if self.loss_images else own

    def on_train_start(self) -> None:
        """Look at the network as it is used."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained."""

    def training_step(self, batch: Any, batch_index: int) -> None:
        """Take in one batch of images (B, C, H, W)."""
        images, left = batch[0], max(0, self.loss_images - self._seen)
        for part, differentiated in ((images[:left], True), (images[left:], False)):
            if len(part):
                self._look(part, differentiated=differentiated)

    def _look(self, images: Tensor, *, differentiated: bool) -> None:
        inputs, outputs = ([(name, after) for name in self._layers] for after in (False, True))
        with (
            torch.set_grad_enabled(differentiated),
            full_precision(images),
            watch(self.net, inputs) as flows,
            watch(self.net, outputs if differentiated else []) as ends,
        ):
            logits = self.net(images)
        with torch.no_grad():
            self._take_in(flows)
        if differentiated:
            self._slopes(logits, ends)
        self._seen += len(images)

    def _take_in(self, flows: Mapping[str, Tensor]) -> None:
        for name in self._layers:
            linear = self.net.get_submodule(name)
            x = self._tokens[name](flows[name])
            index = self.sampling.index(x, self._stream.prefix, self._seen)
            if isinstance(linear, GatheredLinear):
                x = x[..., linear.index]
            if self.metric == "mean_input":
                self._add(f"{name}.tokens", x.sum(0))
            patches = x.shape[1] - self._stream.prefix
            x = take(x, index)
            weights = self._weights(linear, x, patches)
            if self.metric == "asvd":
                share = weights / weights.sum(1, keepdim=True)
                self._add(f"{name}.abs", (x.abs() * share.unsqueeze(-1)).sum((0, 1)))
            if self.metric in _MOMENTS:
                moments = self.moments[key_of(name)]
                assert isinstance(moments, Moments)
                moments.add(x.flatten(0, 1), weights.flatten())

    def _weights(self, linear: nn.Module, x_BnC: Tensor, patches: int) -> Tensor:
        """Return what each sampled token counts, (B, n).

        Of other people's metrics all tokens count alike, so a sampled patch stands for those left
        out; of ours, a token that the classifier reads counts as many sampled patches as is said.
        """
        prefix = self._stream.prefix
        weights = torch.ones(x_BnC.shape[:2], device=x_BnC.device)
        if self.metric in ("centred", "loss"):
            weights[:, : self._stream.readout] = self.sampling.readout
            return weights
        weights[:, prefix:] = patches / max(1, weights.shape[1] - prefix)
        if self.metric == "normalised_output":
            outputs = x_BnC @ linear.get_parameter("weight").mT
            weights = weights / outputs.square().sum(-1).clamp_min(1e-12)
        return weights

    def _slopes(self, logits: Tensor, ends: Mapping[str, Tensor]) -> None:
        """Add up products of the logits' derivatives, by random signs (Hutchinson's estimator)."""
        generator = torch.Generator().manual_seed(self._seen)
        signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
        found = torch.autograd.grad((logits * signs).sum(), [ends[name] for name in self._layers])
        slopes = {n: g.flatten(0, -2) for n, g in zip(self._layers, found, strict=True)}
        for name, slope in slopes.items():
            self._add(f"{name}.slope", slope.square().sum(0))
        for name, piece in self._pieces.items():
            rows = slopes[piece.layer][:, piece.start : piece.start + piece.rows]
            if piece.rows > piece.columns:
                rows = rows @ piece.of(self.net.get_parameter(f"{piece.layer}.weight"))
            self._add(f"{name}.products", rows.mT @ rows)

    def _add(self, name: str, part: Tensor) -> None:
        if not bool(torch.isfinite(part).all()):
            raise MomentsError(f"{name}: not finite on a batch; look at the images and the weights")
        add_to(self, name, part)

    def on_train_end(self) -> None:
        """Bring sums into their final form."""
        for moments in self.moments.values():
            assert isinstance(moments, Moments)
            moments.finish()
        self.images.fill_(self._seen)

    def evidence(self) -> Evidence:
        """Return what was gathered; empty where no image was seen."""
        seen = int(self.images)
        if not seen:
            return Evidence(scores={})
        differentiated = min(seen, self.loss_images)
        found: dict[str, dict[str, Tensor]] = {}
        for name in self._layers:
            found[name] = {
                what: self.get_buffer(key_of(f"{name}.{what}")).cpu()
                / (differentiated if what == "slope" else seen)
                for what in self._sums()
            }
            if key_of(name) in self.moments:
                moments = self.moments[key_of(name)]
                assert isinstance(moments, Moments)
                found[name] |= moments.tensors()
        for name in self._pieces:
            products = self.get_buffer(key_of(f"{name}.products")).cpu() / differentiated
            found.setdefault(name, {})["products"] = products
        return Evidence(scores={}, moments=found)
