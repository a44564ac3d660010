"""The scorer of low-rank methods: what enters each Linear, and how much its outputs matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.lowrank import Metric
from vitrim.model import stream, structure
from vitrim.model.attention import GatheredLinear
from vitrim.moments import Moments, MomentsError, add_to, key_of
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Sampling, full_precision, take, watch

_MOMENTS = ("whitening", "normalised_output", "centred", "loss")


class Profile(LightningModule):
    """Pass proxy images through a network once and keep what the metric of its layers needs.

    Evidence has no scores but `moments`, by layer: `weight`, `mean` and `cov` of its inputs (for
    normalised_output every token counts 1 / ||W x||^2), `abs` E|x| for asvd, `tokens` (N, in), the
    mean over images, for mean_input. With `loss_images` above 0 also `slope` (out,): the squared
    derivative of the logits by each output, summed over logits and tokens and averaged over as many
    images, by random signs. All take the same memory whatever the number of images.
    """

    resumes_at = "never"

    images: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        layers: Sequence[str],
        metric: Metric,
        sampling: Sampling,
        loss_images: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.epochs = 1 if layers else 0
        self.samples = sampling.images
        self.sampling = sampling
        self.metric = metric
        self.loss_images = loss_images
        self.settings: dict[str, Any] = {
            "layers": list(layers),
            "metric": metric,
            "sampling": asdict(sampling),
            "loss_images": loss_images,
        }
        self._layers = list(layers)
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
        images = batch[0]
        places = [(name, False) for name in self._layers]
        with torch.no_grad(), full_precision(images), watch(self.net, places) as flows:
            self.net(images)
            self._take_in(flows)
        left = self.loss_images - self._seen
        if left > 0:
            self._slopes(images[:left])
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

    def _slopes(self, images: Tensor) -> None:
        """Add up squared derivatives of the logits, by random signs (Hutchinson's estimator)."""
        places = [(name, True) for name in self._layers]
        with full_precision(images), torch.enable_grad(), watch(self.net, places) as flows:
            logits = self.net(images)
        generator = torch.Generator().manual_seed(self._seen)
        signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2 - 1
        found = torch.autograd.grad((logits * signs).sum(), [flows[name] for name in self._layers])
        for name, slope in zip(self._layers, found, strict=True):
            self._add(f"{name}.slope", slope.square().sum(tuple(range(slope.ndim - 1))))

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
        found: dict[str, dict[str, Tensor]] = {}
        for name in self._layers:
            images = {"slope": min(seen, self.loss_images)}
            found[name] = {
                what: self.get_buffer(key_of(f"{name}.{what}")).cpu() / images.get(what, seen)
                for what in self._sums()
            }
            if key_of(name) in self.moments:
                moments = self.moments[key_of(name)]
                assert isinstance(moments, Moments)
                found[name] |= moments.tensors()
        return Evidence(scores={}, moments=found)
