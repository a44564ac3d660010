"""Adaptors: linear maps of channels around a removed block, which start as the identity.

PRACTISE (arXiv 2202.07861) puts a 1x1 convolution after the last convolution of every earlier block
of the stage and after its shortcut convolution, and before the first convolution of every later
block of the stage and of the next stage's first block, and before its shortcut convolution. In
transformers (the port in DC-ViT's code) these are Linear layers with a bias: after the last layer
of the MLP of every earlier block, and before the layers that make queries, keys and values in every
later block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.budget.blocks import Group, lone_blocks
from vitrim.network.structure import Layer, Structure, block_order


class Place(NamedTuple):
    """Where an adaptor is: before or after the module at a path."""

    module: str
    before: bool


class Adaptor(nn.Module):
    """A linear map of the channels of x, the identity at first."""

    bias: nn.Parameter | None

    def __init__(self, width: int, *, channels: int, biased: bool, like: Tensor) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.eye(width, dtype=like.dtype, device=like.device))
        self.bias = nn.Parameter(like.new_zeros(width)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x to its own shape; its channels are dimension 1 of a feature map, else the last."""
        if self.channels == 1:
            return F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return F.linear(x, self.weight, self.bias)


class Skip(nn.Module):
    """What replaces a removed block: x, whatever else the block takes."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Return x."""
        return x


def places_of(net: nn.Module, described: Structure, group: Group) -> list[Place]:
    """Return where adaptors are while the blocks of `group` are removed."""
    order = block_order(described)
    earlier, later = order[: order.index(group[0])], order[order.index(group[-1]) + 1 :]
    if group[0] in lone_blocks(described):
        earlier = [block for block in earlier if _stage(block) == _stage(group[0])]
        inside = [block for block in later if _stage(block) == _stage(group[0])]
        later = later[: len(inside) + 1]
    layers = _layers(net, described)
    after = [name for block in earlier for name in _writers(net, block, layers[block])]
    before = [name for block in later for name in _readers(net, block, layers[block])]
    return [*(Place(name, False) for name in after), *(Place(name, True) for name in before)]


def _stage(block: str) -> str:
    return block.rpartition(".")[0]


def _layers(net: nn.Module, described: Structure) -> dict[str, list[Layer]]:
    """Return the layers of every block, in order, without norms."""
    blocks = {branch.name: branch.block for branch in described.branches}
    layers: dict[str, list[Layer]] = {}
    for layer in described.layers:
        if net.get_parameter(f"{layer.name}.weight").ndim > 1:
            layers.setdefault(blocks.get(layer.branch, layer.branch), []).append(layer)
    return layers


def _writers(net: nn.Module, block: str, layers: Sequence[Layer]) -> list[str]:
    """Return the paths of the layers whose outputs add up to what the block adds."""
    return [layers[-1].name, *_shortcuts(net, block, layers)]


def _readers(net: nn.Module, block: str, layers: Sequence[Layer]) -> list[str]:
    """Return the paths of the layers that read what enters the block, or its first norm."""
    first = layers[0]
    reads = {part.site for part in first.inp}
    readers = [
        layer.name
        for layer in layers
        if layer is first
        or (layer.branch == first.branch and reads == {part.site for part in layer.inp})
    ]
    return [*readers, *_shortcuts(net, block, layers)]


def _shortcuts(net: nn.Module, block: str, layers: Sequence[Layer]) -> list[str]:
    """Return the paths of the convolutions of a block that are not in its main path."""
    known = {layer.name for layer in layers}
    if not isinstance(net.get_submodule(layers[0].name), nn.Conv2d):
        return []
    paths = (
        f"{block}.{path}"
        for path, module in net.get_submodule(block).named_modules()
        if isinstance(module, nn.Conv2d)
    )
    return [path for path in paths if path not in known]


def channels_of(module: nn.Module) -> int:
    """Return which dimension of what `module` maps holds the channels."""
    return 1 if any(isinstance(part, nn.Conv2d) for part in module.modules()) else -1


@torch.no_grad()
def widths_of(net: nn.Module, places: Collection[Place], images: Tensor) -> dict[Place, int]:
    """Return the number of channels at each place; a module that is not called has none.

    Args:
        net: the network.
        places: where adaptors will be.
        images: at least one, (B, C, H, W).
    """
    widths: dict[Place, int] = {}

    def record(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
            widths[place] = (output[0] if output else args[0]).shape[channels_of(module)]

        return hook

    handles = []
    for place in places:
        module, hook = net.get_submodule(place.module), record(place)
        handles.append(
            module.register_forward_pre_hook(hook)
            if place.before
            else module.register_forward_hook(hook)
        )
    try:
        net.forward_features(images[:1])  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    return widths


@contextmanager
def adapted(
    net: nn.Module, replacements: Mapping[str, nn.Module], adaptors: Mapping[Place, Adaptor]
) -> Iterator[None]:
    """Replace blocks of `net`, by their paths, and insert adaptors, within this context."""
    originals = {block: net.get_submodule(block) for block in replacements}
    handles = []
    try:
        for block, replacement in replacements.items():
            net.set_submodule(block, replacement)
        for place, adaptor in adaptors.items():
            module = net.get_submodule(place.module)
            handles.append(
                module.register_forward_pre_hook(_before(adaptor))
                if place.before
                else module.register_forward_hook(_after(adaptor))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block, original in originals.items():
            net.set_submodule(block, original)


def _before(adaptor: Adaptor) -> Callable[..., tuple[Tensor, ...]]:
    return lambda module, args: (adaptor(args[0]), *args[1:])


def _after(adaptor: Adaptor) -> Callable[..., Tensor]:
    return lambda module, args, output: adaptor(output)
