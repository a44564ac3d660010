"""What is known of a network by its class: each function is registered by the family modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError
from vitrim.network.stream import Stream
from vitrim.network.structure import Site, Structure


class UnsupportedArchitecture(VitrimError):
    """The network's class is of no family that can be cut exactly."""


@singledispatch
def structure(net: nn.Module) -> Structure:
    """Describe the sites, branches and layers of a network, dense or already cut.

    Raises:
        UnsupportedArchitecture: naming the class and the supported ones.
    """
    supported = sorted(
        {family.__name__ for family in structure.registry if family not in (object, nn.Module)}
    )
    raise UnsupportedArchitecture(
        f"{type(net).__name__} cannot be cut; supported network classes: {', '.join(supported)}"
    )


@singledispatch
def stream(net: nn.Module) -> Stream:
    """Describe how the residual stream of a network runs, dense or cut.

    Raises:
        UnsupportedArchitecture: naming the class.
    """
    raise UnsupportedArchitecture(
        f"{type(net).__name__} has no residual stream of tokens to follow: expected a method "
        "that needs none, as fskd, cd, practise, mir and vtp, or oneshot by weights alone "
        "(criterion magnitude, group_l2 or random, and compensation none)"
    )


@singledispatch
def drop(net: nn.Module, branch: str) -> None:
    """Remove a residual branch from `net` itself: the modules, not only what they compute."""
    raise UnsupportedArchitecture(f"{type(net).__name__} has no branches to drop")


@singledispatch
def computed(net: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `net` that are not saved with it but follow from its class, by name.

    Those on the meta device, of modules that timm can fill again, in the parameters' type.
    """
    dtype = next((tensor.dtype for tensor in net.parameters()), None)
    found: dict[str, Tensor] = {}
    for path, module in net.named_modules():
        empty = {name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if empty and hasattr(module, "init_non_persistent_buffers"):
            filled = _filled(module, dtype)
            found |= {f"{path}.{name}".removeprefix("."): filled[name] for name in empty}
    return found


def _filled(module: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the buffers that a module of timm has on the CPU; `module` itself is not touched."""
    twin = copy.copy(module)
    twin._buffers = {
        name: None if buffer is None else torch.empty_like(buffer, device="cpu")
        for name, buffer in module._buffers.items()
    }
    twin.init_non_persistent_buffers()
    twin._modules, twin._parameters = {}, {}
    twin.to(dtype)  # as a whole network is: timm keeps some buffers in float32 even then
    return dict(twin._buffers)


@singledispatch
def settle(net: nn.Module, size: tuple[int, int]) -> None:
    """Make `net` itself one for images of one size (height, width), if any size may come."""


def sites(net: nn.Module) -> Mapping[str, Site]:
    """Return the sites of `net` that can be cut exactly, by name, in network order."""
    return {name: site for name, site in structure(net).sites.items() if not site.locked}


def branches(net: nn.Module) -> tuple[str, ...]:
    """Return the residual branches of `net` that can be dropped, in network order."""
    return tuple(branch.name for branch in structure(net).branches)
