"""SmoothQuant's scaling (arXiv 2211.10438): outliers of activations are folded into weights.

A few channels of a norm's output are far larger than the others, so that few levels of int8 are
left for these. Channel j is divided by

    s_j = max |x_j|^a / max_i |W_ij|^(1 - a)

in the norm, and multiplied by it in the columns of the layers that read the norm: the network
computes the same. Layers after an attention or an activation stay as they are, because there is no
norm before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError
from vitrim.network.attention import GatheredLinear
from vitrim.network.dispatch import stream, structure
from vitrim.network.int8 import is_int8
from vitrim.network.structure import Structure, of_kind


class _Reader(NamedTuple):
    """A weight (out, columns) and which channels of the norm its columns read, (columns,)."""

    weight: Tensor
    channels: Tensor


@torch.no_grad()
def smooth_(net: nn.Module, batches: Iterable[Tensor], *, exponent: float) -> nn.Module:
    """Scale every norm that only Linears read, and these Linears, in place; return `net`.

    Args:
        net: a network in eval mode, dense or cut, in float.
        batches: of images (B, C, H, W), of which the largest activations are taken.
        exponent: a, from 0 to 1: how much of the activations' range goes to the weights.

    Raises:
        UnsupportedArchitecture: the network has no residual stream of tokens.
        VitrimError: there are no images.
    """
    readers = dict(_readers(net, structure(net)))
    maxima = _maxima(net, [*readers], batches)
    if maxima.keys() != readers.keys():
        raise VitrimError("SmoothQuant's scaling needs images")
    for name, of_norm in readers.items():
        norm = net.get_submodule(name)
        largest = torch.zeros_like(maxima[name])
        for weight, channels in of_norm:
            of_columns = weight.abs().amax(0).to(largest)
            largest[channels] = torch.maximum(largest[channels], of_columns)
        scale = maxima[name] ** exponent / largest ** (1 - exponent)
        scale = torch.where((maxima[name] > 0) & (largest > 0), scale, 1.0)
        for tensor in norm.parameters():
            tensor.div_(scale)
        for weight, channels in of_norm:
            weight.mul_(scale[channels])
    return net


def _readers(net: nn.Module, described: Structure) -> Iterator[tuple[str, list[_Reader]]]:
    """Iterate over the norms that only Linears in float read: path, and the weights of these."""
    inputs = {site.name for site in of_kind(described, "input")}
    for branch in stream(net).branches:
        norm = net.get_submodule(branch.reader)
        layers = [
            layer
            for layer in described.layers
            if layer.branch == branch.name and layer.inp and layer.inp[0].site in inputs
        ]
        modules = [net.get_submodule(layer.name) for layer in layers]
        scales = isinstance(norm, nn.LayerNorm) and norm.elementwise_affine
        if modules and scales and not any(map(is_int8, modules)):
            yield branch.reader, [_reader(module) for module in modules]


def _reader(layer: nn.Module) -> _Reader:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, GatheredLinear):
        return _Reader(weight, layer.index)
    return _Reader(weight, torch.arange(weight.shape[1], device=weight.device))


def _maxima(net: nn.Module, norms: list[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the largest magnitude of every channel of the norms' outputs, (D,)."""
    maxima: dict[str, Tensor] = {}

    def hook(name: str, output: Tensor) -> None:
        largest = output.flatten(0, -2).abs().amax(0)
        maxima[name] = torch.maximum(maxima.get(name, largest), largest)

    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: hook(name, output)
        )
        for name in norms
    ]
    try:
        for images in batches:
            net(images)
    finally:
        for handle in handles:
            handle.remove()
    return maxima
