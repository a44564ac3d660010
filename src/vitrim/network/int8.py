"""Which layers of a network may be int8, and how they become so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from vitrim.network.attention import GatheredLinear
from vitrim.network.factored import LowRankLinear, SplitLinear
from vitrim.network.int8_linear import Int8Linear, to_int8
from vitrim.network.structure import Structure
from vitrim.network.survivors import similar
from vitrim.plan import Int8, Plan, PlanError

_LAYERS = (GatheredLinear, LowRankLinear, SplitLinear)
"""Layers that consist of Linears and are one Linear in the dense network."""


def linears_of(net: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of `net` that can be int8, by the names that they have in a plan.

    They are all plain Linears, also those that no plan slices: the classifier, patch merging. A
    Linear behind a gather, in factors or in pieces is one layer.
    """
    return dict(_linears(net, ""))


def _linears(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is nn.Linear or isinstance(module, _LAYERS):
        if not is_int8(module):
            yield path, module
        return
    for name, child in module.named_children():
        yield from _linears(child, f"{path}.{name}" if path else name)


def is_int8(net: nn.Module) -> bool:
    """Whether a layer of `net` is int8."""
    return any(isinstance(module, Int8Linear) for module in net.modules())


def int8_of(net: nn.Module, described: Structure, plan: Plan) -> dict[str, bool]:
    """Return the layers that the plan makes int8, and whether their inputs are int8 as well.

    Raises:
        PlanError: a layer is unknown, int8 already or in a dropped branch, its inputs cannot be
            int8, or the plan edits a network with int8 layers in another way.
    """
    if any(not isinstance(edit, Int8) for edit in plan.edits) and is_int8(net):
        raise PlanError(
            "the network has int8 layers and cannot be cut: cut the float network, and make the "
            "result int8"
        )
    edits = [*plan.int8s()]
    known = linears_of(net) if edits else {}
    dropped = tuple(f"{edit.branch}." for edit in plan.drops())
    for edit in edits:
        name = edit.linear
        if name not in known:
            raise PlanError(
                f"unknown linear {name!r}, or int8 already: expected one of {similar(name, known)}"
            )
        if dropped and name.startswith(dropped):
            raise PlanError(f"{name!r} is edited, but its branch is dropped")
        if edit.dynamic and name in read_by_name(described):
            raise PlanError(
                f"linear {name!r}: its inputs cannot be int8, because the network reads its weight "
                "without calling it: set dynamic=false"
            )
    return {edit.linear: edit.dynamic for edit in edits}


def read_by_name(described: Structure) -> set[str]:
    """Return the layers whose weights the network reads without calling the layer."""
    return {layer.name for layer in described.layers if layer.positions_from}


def int8_edits(net: nn.Module, described: Structure, *, dynamic: bool) -> tuple[Int8, ...]:
    """Return the edits that make every Linear of `net` int8.

    With `dynamic`, inputs are int8 as well, but for layers whose weights are read by name.
    """
    by_name = read_by_name(described)
    return tuple(
        Int8(linear=name, dynamic=dynamic and name not in by_name) for name in linears_of(net)
    )


def quantize_(net: nn.Module, layers: Mapping[str, bool]) -> nn.Module:
    """Make layers of `net` int8 in place and return it; by name, whether inputs are as well."""
    for name, dynamic in layers.items():
        net.set_submodule(name, to_int8(net.get_submodule(name), dynamic=dynamic))
    return net
