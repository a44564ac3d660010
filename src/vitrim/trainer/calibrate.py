"""The scorer that trains nothing: one pass over images, and moments of the activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.closed_form.importance import consumer_of
from vitrim.closed_form.moments import Moments, MomentTensors, add_to, full_precision, key_of
from vitrim.errors import is_count, is_positive, require
from vitrim.network import stream, structure
from vitrim.network.factored import widths_of_layer
from vitrim.network.structure import Attention, Layer, Structure
from vitrim.plan import Evidence
from vitrim.trainer.activations import Batches, capture
from vitrim.trainer.shared_pass import Share, SharedPass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Which images, and which of their tokens, statistics are computed from.

    Regressions, and the moments of one-shot pruning, weight a patch by the inverse variance of its
    stream, so that a few tokens of huge norm do not outweigh all others.

    Args:
        images: drawn from the training set by the run's seed, without augmentation; all of it if it
            has fewer.
        tokens: patches sampled from each image, besides the class token: evenly spaced, from
            another start in each image. None: all.
        class_token_weight: of a class token that the classifier reads; a patch has 1 on average.
        available_images: size of the training set if it is smaller than `images`: then more tokens
            of each image are sampled, in proportion, so that least squares has enough rows.
    """

    images: int
    tokens: int | None
    class_token_weight: float
    available_images: int | None = None

    def __post_init__(self) -> None:
        for rule in (
            ("images", is_count(self.images), "a whole number from 1 on"),
            ("tokens", self.tokens is None or is_count(self.tokens), "null or a whole number"),
            ("class_token_weight", is_positive(self.class_token_weight), "a number above 0"),
        ):
            require("method.sampling", self, rule)

    @property
    def tokens_per_image(self) -> int | None:
        """Patches that are sampled from each image at most, None: all.

        >>> few = {"images": 1000, "available_images": 500}
        >>> Sampling(tokens=48, class_token_weight=4.0, **few).tokens_per_image
        96
        """
        if self.tokens is None or self.available_images is None:
            return self.tokens
        return self.tokens * max(1, self.images // self.available_images)

    def index(self, x: Tensor, n_prefix_tokens: int, seen: int) -> Tensor:
        """Return which tokens of x are sampled, (B, n).

        Args:
            x: the stream, (B, N, D) or (B, H, W, D); of a classifier's input, N may be 1.
            n_prefix_tokens: how many tokens come before the patches; they are always sampled.
            seen: how many images came before these.
        """
        patches, most = x.shape[1:-1].numel() - n_prefix_tokens, self.tokens_per_image
        stride = 1 if most is None or not patches else max(1, patches // min(most, patches))
        image = seen + torch.arange(len(x), device=x.device)
        spaced = torch.arange(patches // stride, device=image.device) * stride
        first = torch.arange(n_prefix_tokens, device=image.device).expand(len(image), -1)
        return torch.cat([first, n_prefix_tokens + spaced + (image % stride)[:, None]], dim=1)

    def weights(self, x_BnD: Tensor, n_prefix_tokens: int, n_readout_tokens: int) -> Tensor:
        """Return the weight of each sampled token, (B, n).

        Args:
            x_BnD: the stream at the sampled tokens.
            n_prefix_tokens: how many tokens come before the patches.
            n_readout_tokens: how many of these the classifier reads.
        """
        weights = 1 / x_BnD.float().var(-1).clamp_min(1e-12)
        weights = weights / weights[:, n_prefix_tokens:].mean(1, keepdim=True)
        weights[:, :n_prefix_tokens] = 1.0
        weights[:, :n_readout_tokens] = self.class_token_weight
        return weights


def gather_tokens(x: Tensor, index_Bn: Tensor) -> Tensor:
    """Return the indexed tokens of x, (B, N, C) or (B, H, W, C), as (B, n, C)."""
    x_BNC = x.flatten(1, -2)
    starts = torch.arange(len(x), device=x.device)[:, None] * x_BNC.shape[1]
    rows = x_BNC.flatten(0, 1).index_select(0, (starts + index_Bn).flatten())
    return rows.view(*index_Bn.shape, -1)


class UnitLosses(Protocol):
    """What predicts the losses of the units of `sites`, from the same images."""

    sites: Sequence[str]
    epochs: int
    settings: Mapping[str, object]
    shares: Sequence[Share]

    def observe(self, images: Tensor, epoch: int) -> None:
        """Take in a batch of images (B, C, H, W)."""
        ...

    def conclude(self, moments: MomentTensors) -> Mapping[str, Tensor]:
        """Return the loss of each unit, by site, given the finished moments."""
        ...


class Calibrate(SharedPass):
    """Pass calibration images through a network once and keep moments of its units' activations.

    Evidence has no scores (the criterion computes them), but `moments`: for each layer that
    consumes units `weight`, `mean` and `cov` of its inputs; for each query-key site the same of q
    and k, per head. With `taylor` also each unit's first-order effect on the loss against the
    network's own decision. Memory does not depend on the number of images.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        sites: Sequence[str],
        sampling: Sampling,
        taylor: bool,
        losses: UnitLosses | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.epochs = (losses.epochs if losses else 1) if sites else 0
        self.losses = losses
        self.calibration_images = sampling.images
        self.sampling = sampling
        self.taylor = taylor
        self.settings: dict[str, object] = {
            "sites": list(sites),
            "sampling": asdict(sampling),
            "taylor": taylor,
            **({"losses": losses.settings} if losses else {}),
        }
        described = structure(net)
        if sites:  # a network without a stream can be scored by its weights
            self._stream = stream(net)
            self._branches = {branch.name: branch for branch in self._stream.branches}
        self._consumers, self._attentions = _calibrated(described, sites)
        self._dims = {a.qkv: described.sites[a.qk].head_dims for a in self._attentions}
        self.moments = nn.ModuleDict()
        for layer in self._consumers:
            width = widths_of_layer(net.get_submodule(layer.name))[0]
            self.moments[key_of(layer.name)] = Moments(layer.name, width)
        for attention in self._attentions:
            dims = self._dims[attention.qkv]
            for part in ("q", "k"):
                name = f"{attention.qk}.{part}"
                self.moments[key_of(name)] = Moments(name, max(dims), (len(dims),))
        for name in self._extra_statistics():
            self.register_buffer(key_of(name), torch.empty(0))
        self._seen = 0
        self._share = Share(self, self._extra_statistics())
        self.shares = [*(losses.shares if losses else ()), self._share]
        self._batches = Batches(self._points() if sites else [], graph=taylor)

    def _extra_statistics(self) -> list[str]:
        """Return the names of the statistics that are kept besides moments."""
        consumers = [layer.name for layer in self._consumers]
        units = [*consumers, *(attention.qk for attention in self._attentions)]
        losses = [f"{site}.losses" for site in self.losses.sites] if self.losses else []
        return [*losses, *(f"{name}.taylor" for name in units if self.taylor)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Add one batch of images (B, C, H, W) to the statistics."""
        if self.losses:
            self.losses.observe(batch[0], self.current_epoch)
        if self.current_epoch + 1 < self.epochs:
            return
        with full_precision(batch[0]):
            for images in self._batches.of(batch[0], self.net):
                self._share.take(partial(self._take_in, images))
                self._seen += len(images)

    def _points(self) -> list[tuple[str, bool]]:
        """Return the modules to capture, and whether their output is meant (else their input)."""
        branches = [layer.branch for layer in self._consumers]
        branches += [attention.branch for attention in self._attentions]
        readers = dict.fromkeys(self._branches[branch].reader for branch in branches)
        inputs = [*readers, *(layer.name for layer in self._consumers)]
        return [*((name, False) for name in inputs), *((a.qkv, True) for a in self._attentions)]

    def _take_in(self, images: Tensor) -> None:
        with (
            torch.set_grad_enabled(self.taylor),
            capture(self.net, self._points()) as activations,
        ):
            logits = self.net(images)
        if self.taylor:
            self._first_order(logits, activations)
        with torch.no_grad():
            self._add_moments(activations)

    def _add_moments(self, activations: dict[str, Tensor]) -> None:
        """Add activations to the moments; the widest ones are freed one after the other."""
        for layer in self._consumers:
            branch = self._branches[layer.branch]
            index, weights = self._sampled(activations[branch.reader])
            rows = gather_tokens(branch.tokens(activations.pop(layer.name)), index)
            self._moments(layer.name).add(rows.flatten(0, 1), weights.flatten(), wait=True)
        for attention in self._attentions:
            branch = self._branches[attention.branch]
            index, weights = self._sampled(activations[branch.reader])
            dims = self._dims[attention.qkv]
            outputs = gather_tokens(branch.tokens(activations.pop(attention.qkv)), index)
            both = outputs.flatten(0, 1)[:, : 2 * sum(dims)]
            for part, rows in zip(("q", "k"), both.chunk(2, dim=1), strict=True):
                self._moments(f"{attention.qk}.{part}").add(_by_head(rows, dims), weights.flatten())

    def _sampled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of the sampled tokens of the stream x and their weights, (B, n) each."""
        index = self.sampling.index(x, self._stream.n_prefix_tokens, self._seen)
        tokens = gather_tokens(x, index)
        return index, self.sampling.weights(
            tokens, self._stream.n_prefix_tokens, self._stream.n_readout_tokens
        )

    def _moments(self, name: str) -> Moments:
        moments = self.moments[key_of(name)]
        assert isinstance(moments, Moments)
        return moments

    def _first_order(self, logits: Tensor, activations: Mapping[str, Tensor]) -> None:
        """Add up |sum over tokens of x dL/dx| per unit, L the loss of the network's own choice."""
        loss = F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
        layers = [(layer.name, layer.name, layer.branch) for layer in self._consumers]
        layers += [(a.qkv, a.qk, a.branch) for a in self._attentions]
        slopes = torch.autograd.grad(loss, [activations[name] for name, _, _ in layers])
        for (name, key, branch), slope in zip(layers, slopes, strict=True):
            effects = self._branches[branch].tokens(activations[name].detach() * slope)
            effect = effects.sum(1).abs().sum(0)
            if name in self._dims:
                effect = effect[: sum(self._dims[name])]
            add_to(self, f"{key}.taylor", effect)

    def on_train_end(self) -> None:
        """Sum over the processes, and bring sums into their final form."""
        for share in self.shares:
            share.reduce()
        for moments in self.moments.values():
            assert isinstance(moments, Moments)
            moments.finish()
        if self.losses and self._seen:
            for site, losses in self.losses.conclude(self.evidence().moments).items():
                self.register_buffer(key_of(f"{site}.losses"), losses)

    def evidence(self) -> Evidence:
        """Return the moments, and losses as scores; empty where no image was seen."""
        if not all(moments.get_buffer("cov").numel() for moments in self.moments.values()):
            return Evidence()
        statistics: dict[str, dict[str, Tensor]] = {
            layer.name: self._moments(layer.name).tensors() for layer in self._consumers
        }
        for attention in self._attentions:
            statistics[attention.qk] = {
                f"{part}.{name}": tensor
                for part in ("q", "k")
                for name, tensor in self._moments(f"{attention.qk}.{part}").tensors().items()
            }
        scores: dict[str, Tensor] = {}
        for name in self._extra_statistics():
            owner, _, kind = name.rpartition(".")
            value = self.get_buffer(key_of(name))
            if kind == "losses":
                scores[owner] = value
            else:
                statistics.setdefault(owner, {})[kind] = value
        return Evidence(moments=statistics, scores=scores)


def _calibrated(described: Structure, sites: Sequence[str]) -> tuple[list[Layer], list[Attention]]:
    """Return the layers that consume the units of `sites`, and the attentions of its qk sites."""
    values = {attention.heads: attention.v for attention in described.attentions}
    by_qk = {attention.qk: attention for attention in described.attentions}
    names = dict.fromkeys(values.get(site, site) for site in sites if site not in by_qk)
    consumers = [consumer_of(described, name) for name in names]
    return consumers, [by_qk[site] for site in sites if site in by_qk]


def classifiers(net: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Iterate over the Linear layers that compute the logits, with their module paths."""
    classifier = net.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and any(module is head for head in heads):
            yield name, module


def _by_head(rows: Tensor, dims: Sequence[int]) -> Tensor:
    """Return rows (n, sum of dims) as (heads, n, widest), narrow heads padded with zeros."""
    widest = max(dims)
    return torch.stack(
        [F.pad(part, (0, widest - part.shape[1])) for part in torch.split(rows, list(dims), dim=1)]
    )
