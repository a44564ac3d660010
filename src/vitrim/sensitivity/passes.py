"""Passes forward and back over images, in which the statistics of losses are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, full_precision
from vitrim.network.structure import Attention
from vitrim.sensitivity.curvature import directions, visible_attention, whitened
from vitrim.sensitivity.losses import inverse_root_of
from vitrim.sensitivity.parts import Parts
from vitrim.sensitivity.probes import Probe, feature_divergence, kl_divergence, measure
from vitrim.sensitivity.statistics import Statistics
from vitrim.trainer.activations import capture
from vitrim.trainer.calibrate import Sampling, classifiers
from vitrim.trainer.shared_pass import Share

_CHUNK = 16  # images of one backward pass, whose attention maps are in memory together


class Passes:
    """Gather `statistics` of a network's parts, and the images on which losses are measured.

    Networks without a classifier see their images twice (`epochs`): first for the covariance of the
    features. Several processes share both passes out (`shares`), and the measurements.

    Args:
        net: the dense network, in evaluation mode while images are observed.
        parts: what is scored.
        sampling: which tokens count.
        temperature: of the decision.
        kept_images: how many images are kept for measuring.
    """

    def __init__(
        self,
        net: nn.Module,
        parts: Parts,
        *,
        sampling: Sampling,
        temperature: float,
        kept_images: int,
    ) -> None:
        self.net = net
        self.parts = parts
        self.temperature = temperature
        self.kept_images = kept_images
        self.statistics = Statistics(net, parts, sampling)
        self.has_classifier = any(True for _ in classifiers(net))
        self.epochs = 1 if self.has_classifier else 2
        width = 1 if self.has_classifier else int(net.num_features)  # type: ignore[arg-type]
        self._features = Moments("features", width)
        self._images: list[Tensor] = []
        self._share = Share(self.statistics, self.statistics.sums)
        self._share_of_features = Share(self._features)
        self.shares = [self._share_of_features, self._share]

    def observe(self, images: Tensor, epoch: int = 0) -> None:
        """Take in a batch of images (B, C, H, W).

        Raises:
            MomentsError: activations or gradients are not finite; the layer is named.
        """
        with full_precision(images):
            if epoch + 1 < self.epochs:
                self._share_of_features.take(partial(self._add_features, images))
                return
            self._share_of_features.reduce()
            for chunk in torch.split(images, _CHUNK):
                if self.parts.readers or self.parts.attentions:
                    self._share.take(partial(self._backward, chunk))
                self.statistics.images += len(chunk)
        missing = self.kept_images - sum(map(len, self._images))
        if missing > 0:
            self._images.append(images[:missing])

    @torch.no_grad()
    def _add_features(self, images: Tensor) -> None:
        features = self.net(images)
        self._features.add(features, torch.ones(len(features), device=features.device))

    def _backward(self, images: Tensor) -> None:
        readers, attentions = self.parts.readers, self.parts.attentions
        outputs = [(reader.name, True) for reader in readers]
        outputs += [(attention.qkv, True) for attention in attentions]
        with (
            torch.enable_grad(),
            visible_attention(self.net, [attention.branch for attention in attentions]),
            capture(self.net, [(reader.name, False) for reader in readers]) as input_of,
            capture(self.net, outputs) as output_of,
            maps_of(self.net, attentions) as maps,
        ):
            logits = self.net(images)
        wanted = [output_of[reader.name] for reader in readers]
        wanted += [one for attention in attentions for one in maps[attention.branch]]
        along = (logits * self._directions(logits)).sum()
        gradients = iter(torch.autograd.grad(along, wanted))
        for reader in readers:
            self.statistics.add_layer(reader, input_of[reader.name], next(gradients))
        for attention in attentions:
            of_maps = maps[attention.branch]
            self.statistics.add_attention(
                attention, output_of[attention.qkv], of_maps, [next(gradients) for _ in of_maps]
            )

    def _directions(self, logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(self.statistics.images))
        if self.has_classifier:
            return directions(logits, self.temperature, generator)
        return whitened(logits, self._inverse_root, generator)

    @cached_property
    def _inverse_root(self) -> Tensor:
        """F^(-1/2) of the covariance of the features, with a hundredth of its mean added."""
        self._features.finish()
        return inverse_root_of(self._features.cov.double(), 0.01)

    def finish(self) -> None:
        """Sum over the processes, and bring the statistics into their final form.

        Raises:
            MomentsError: activations or gradients were not finite, in whichever process.
        """
        self._share.reduce()
        self.statistics.finish()

    @property
    def unit(self) -> float:
        """What turns the second moments of gradients into the divergence."""
        return 1 / (2 * self.temperature**2) if self.has_classifier else 0.5

    def measure(self, probes: Sequence[Probe]) -> list[float]:
        """Return the measured loss of each probe, on the images that were kept; they are freed.

        Each of several processes measures some of the probes.
        """
        images, self._images = self._images, []
        if not probes:
            return []
        divergence = (
            kl_divergence(self.temperature)
            if self.has_classifier
            else feature_divergence(self._inverse_root)
        )
        kept = torch.cat(images)
        with full_precision(kept):
            return self._share.measured(
                lambda own: measure(self.net, kept, [probes[at] for at in own], divergence),
                len(probes),
                kept.device,
            )


@contextmanager
def maps_of(net: nn.Module, attentions: Sequence[Attention]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield a dict that gets the attention maps of each attention, one for each run of heads."""
    found: dict[str, list[Tensor]] = {attention.branch: [] for attention in attentions}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, out: found[name].append(out)

    with ExitStack() as stack:
        for name in found:
            module = net.get_submodule(f"{name}.attn_drop")
            stack.callback(module.register_forward_hook(hook_for(name)).remove)
        yield found
