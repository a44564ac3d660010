"""Functions that depend on a network's class; the family modules register the implementations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import singledispatch
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError
from vitrim.network.stream import Stream
from vitrim.network.structure import Site, Structure


class UnsupportedArchitecture(VitrimError):
    """The network's class belongs to no family that can be cut exactly."""


@runtime_checkable
class _HasDerivedBuffers(Protocol):
    """A module of timm that can compute its non-persistent buffers."""

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffers of this module."""


@singledispatch
def structure(net: nn.Module) -> Structure:
    """Describe the sites, branches and layers of a network, dense or already cut.

    Raises:
        UnsupportedArchitecture: no family module handles the class.
    """
    supported = sorted(
        {family.__name__ for family in structure.registry if family not in (object, nn.Module)}
    )
    raise UnsupportedArchitecture(
        f"{type(net).__name__} cannot be cut; supported network classes: {', '.join(supported)}"
    )


@singledispatch
def stream(net: nn.Module) -> Stream:
    """Describe the residual stream of a network, dense or cut.

    Raises:
        UnsupportedArchitecture: the network has no residual stream of tokens.
    """
    raise UnsupportedArchitecture(
        f"{type(net).__name__} has no residual stream of tokens; choose a method or option that "
        "needs none"
    )


@singledispatch
def stepwise(net: nn.Module) -> Stream:
    """Describe the residual stream for what computes it step by step.

    That is `stream`, and the stream of networks whose modules read it channels first, so that hooks
    on the `reader` of a step see it otherwise than its steps.

    Raises:
        UnsupportedArchitecture: the network has no residual stream.
    """
    return stream(net)


@singledispatch
def drop_branch(net: nn.Module, branch: str) -> None:
    """Remove the modules of a residual branch from `net`, in place."""
    raise UnsupportedArchitecture(f"{type(net).__name__} has no branches to drop")


@singledispatch
def non_persistent_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `net` that are not saved because they follow from its class, by name.

    By default these are the buffers on the meta device of modules that timm can fill again, in the
    dtype of the parameters.
    """
    dtype = next((tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()), None)
    buffers: dict[str, Tensor] = {}
    for path, module in net.named_modules():
        empty = {name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        can_fill = isinstance(module, _HasDerivedBuffers)
        if empty and can_fill:
            filled = _filled_buffers(module, dtype)
            buffers |= {f"{path}.{name}".removeprefix("."): filled[name] for name in empty}
    return buffers


def _filled_buffers(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the buffers that a module of timm has on the CPU; `module` is not modified."""
    twin = copy.copy(module)
    assert isinstance(twin, _HasDerivedBuffers)
    twin._buffers = {
        name: None if buffer is None else torch.empty_like(buffer, device="cpu")
        for name, buffer in module._buffers.items()
    }
    twin.init_non_persistent_buffers()
    twin._modules, twin._parameters = {}, {}
    twin.to(dtype)  # not the buffers directly: timm keeps some of them in float32
    return {name: buffer for name, buffer in twin._buffers.items() if buffer is not None}


@singledispatch
def fix_input_size(net: nn.Module, size: tuple[int, int]) -> None:
    """Fix `net`, in place, to images of one size (height, width), if it accepts any size."""


def sites(net: nn.Module) -> Mapping[str, Site]:
    """Return the sites of `net` that can be cut exactly, by name, in network order."""
    return {name: site for name, site in structure(net).sites.items() if not site.locked_reason}


def branches(net: nn.Module) -> tuple[str, ...]:
    """Return the residual branches of `net` that can be dropped, in network order."""
    return tuple(branch.name for branch in structure(net).branches)
