"""The description of timm's MLPs: the layers before, between and after their hidden units.

Sites of the MLP at a module path (D wide, M hidden):
    mlp.input    (D,)   columns of the first Linears    gathered; absent where they are convolutions
    mlp.hidden   (M,)   rows of the first layers, channels in between, columns of the last layer
"""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import ConvMlp, GluMlp, Mlp, SwiGLU
from timm.models.levit import LevitMlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn

from vitrim.network.dispatch import UnsupportedArchitecture
from vitrim.network.factored import layers_of, widths_of_layer
from vitrim.network.structure import Dim, Layer, Part, Site, Structure, full


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layers:
    """The layers of a class of MLPs, by name.

    `first` are the layers whose rows are the hidden units, `rows_per_unit` each; `between` are
    depthwise convolutions and BatchNorms, with one channel per unit; `last` reads the units.
    """

    first: tuple[str, ...] = ("fc1",)
    rows_per_unit: int = 1
    between: tuple[str, ...] = ()
    last: str = "fc2"


_LAYERS = {
    Mlp: _Layers(),
    ConvMlp: _Layers(),
    GluMlp: _Layers(rows_per_unit=2),
    SwiGLU: _Layers(first=("fc1_g", "fc1_x")),
    MlpWithDepthwiseConv: _Layers(between=("dwconv",)),
    LevitMlp: _Layers(first=("ln1.linear",), between=("ln1.bn",), last="ln2.linear"),
}
SUPPORTED = ", ".join(kind.__name__ for kind in _LAYERS)
"""The classes of MLPs that can be cut."""


def is_mlp(module: nn.Module) -> bool:
    """Whether a module is an MLP that can be cut."""
    return type(module) in _LAYERS


def mlp_of(name: str, mlp: nn.Module) -> Structure:
    """Describe the MLP at module path `name`, dense or cut.

    Raises:
        UnsupportedArchitecture: its class is not one of timm's MLPs.
    """
    layers = _LAYERS.get(type(mlp))
    if layers is None:
        raise UnsupportedArchitecture(f"{name} is a {type(mlp).__name__}; supported: {SUPPORTED}")
    first, last = mlp.get_submodule(layers.first[0]), mlp.get_submodule(layers.last)
    wide, (hidden, out_width) = widths_of_layer(first)[0], widths_of_layer(last)
    gathers = not isinstance(first, nn.Conv2d)
    units = Site(
        name=f"{name}.hidden", kind="hidden", size=hidden, locked_reason=_locked_reason(mlp)
    )
    inputs = Site(name=f"{name}.input", kind="input", size=wide)
    sites = (inputs, units) if gathers else (units,)
    channels = (Part(site=units.name, offset=0, size=hidden),)
    rows = tuple(
        Part(site=units.name, offset=copy * hidden, size=hidden)
        for copy in range(layers.rows_per_unit)
    )
    columns = (Part(site=inputs.name, offset=0, size=wide),) if gathers else full(wide)
    dims: dict[str, tuple[Dim, Dim]] = {path: (rows, columns) for path in layers.first}
    dims |= {path: (channels, ()) for path in layers.between}
    dims[layers.last] = full(out_width), channels
    described = [
        layer
        for path, (out, inp) in dims.items()
        for layer in layers_of(
            mlp.get_submodule(path),
            Layer(
                name=f"{name}.{path}",
                branch=name,
                out=out,
                inp=inp,
                gathers=gathers and path in layers.first,
                locked_reason=_not_factorisable(mlp.get_submodule(path)),
            ),
        )
    ]
    return Structure(sites={site.name: site for site in sites}, layers=tuple(described))


def _locked_reason(mlp: nn.Module) -> str:
    """Return why the hidden units cannot be cut one by one, or an empty string."""
    modules = dict(mlp.named_children())
    if not isinstance(modules.get("norm"), nn.Identity | None):
        return "the hidden units are normalised"
    if any(True for _ in modules["act"].parameters()):
        return "their activation has parameters"
    return ""


def _not_factorisable(layer: nn.Module) -> str:
    """Return why a layer cannot be factorised, or an empty string."""
    match layer:
        case nn.Conv2d():
            return "it is a convolution, and only Linears can be factorised"
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            return "it is a norm, and only Linears can be factorised"
    return ""
