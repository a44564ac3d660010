"""Measured losses: single edits of the dense network, and how far they move its decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrim.network import stepwise
from vitrim.network.dispatch import UnsupportedArchitecture
from vitrim.network.stream import BranchStep, Stream

_CHUNK = 16  # images that pass through the network together

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Maps the outputs of the dense and of the edited network to the mean divergence."""


class Probe(NamedTuple):
    """One edit of the dense network: new values of parameters, and the loss predicted for it.

    `site` is what is cut, `share` the fraction of it; `branches` are those whose parameters change.
    """

    kind: str
    site: str
    share: float
    branches: tuple[str, ...]
    values: Mapping[str, Tensor]
    predicted: float


def rounded(net: nn.Module, probe: Probe) -> Probe:
    """Return a probe whose values have the types of the parameters: those of all are in memory."""
    values = {name: value.to(net.get_parameter(name)) for name, value in probe.values.items()}
    return probe._replace(values=values)


def kl_divergence(temperature: float) -> Divergence:
    """Return the KL divergence (nats) from the dense network's decision, mean over images."""

    def divergence(dense: Tensor, edited: Tensor) -> Tensor:
        p, q = ((z.double() / temperature).log_softmax(1) for z in (dense, edited))
        return (p.exp() * (p - q)).sum(1).mean()

    return divergence


def feature_divergence(root: Tensor) -> Divergence:
    """Return half the squared error of features, in units of their covariance; `root` F^(-1/2)."""

    def divergence(dense: Tensor, edited: Tensor) -> Tensor:
        return ((edited - dense).double() @ root.double()).square().sum(1).mean() / 2

    return divergence


@torch.no_grad()
def measure(
    net: nn.Module, images: Tensor, probes: Sequence[Probe], divergence: Divergence
) -> list[float]:
    """Return the measured loss of each probe on `images` (B, C, H, W); `net` stays as it is.

    The stream before the first edited branch is computed once, so that a probe costs the rest of a
    forward pass. Networks whose stream is not described are run as a whole.
    """
    if not probes:
        return []
    try:
        described: Stream | None = stepwise(net)
    except UnsupportedArchitecture:
        described = None
    total = [0.0] * len(probes)
    for chunk in torch.split(images, _CHUNK):
        if described is None or not described.norm_is_features:
            found = _whole(net, chunk, probes, divergence)
        else:
            found = _along_stream(net, described, chunk, probes, divergence)
        total = [a + b * len(chunk) / len(images) for a, b in zip(total, found, strict=True)]
    return total


def _whole(
    net: nn.Module, images: Tensor, probes: Sequence[Probe], divergence: Divergence
) -> list[float]:
    dense, found = net(images), []
    for probe in probes:
        with edited(net, probe.values):
            found.append(float(divergence(dense, net(images))))
    return found


def _along_stream(
    net: nn.Module,
    described: Stream,
    images: Tensor,
    probes: Sequence[Probe],
    divergence: Divergence,
) -> list[float]:
    names = [step.name if isinstance(step, BranchStep) else "" for step in described.steps]
    first = [min((names.index(b) for b in p.branches), default=len(names)) for p in probes]
    x = described.embed(images)
    dense = logits_from(net, described, x, 0)
    found = [0.0] * len(probes)
    for position in range(len(names) + 1):
        for index, probe in enumerate(probes):
            if first[index] == position:
                with edited(net, probe.values):
                    moved = logits_from(net, described, x, position)
                found[index] = float(divergence(dense, moved))
        if position < len(names):
            x = described.steps[position].advance(x)
    return found


def logits_from(net: nn.Module, described: Stream, x: Tensor, first: int) -> Tensor:
    """Return the outputs of `net` for the stream x before the step at index `first`."""
    outputs: Tensor = net.forward_head(described.features(net, x, first))  # type: ignore[operator]
    return outputs


@contextmanager
def edited(net: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters of `net` other values for a while."""
    before = {name: net.get_parameter(name).detach().clone() for name in values}
    try:
        _assign(net, values)
        yield
    finally:
        _assign(net, before)


@torch.no_grad()
def _assign(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        net.get_parameter(name).copy_(value)
