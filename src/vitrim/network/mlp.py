"""The MLPs of timm: what makes their hidden units, what reads them, what stands in between.

Sites of the MLP at a module path (D wide, M hidden):
    mlp.input    (D,)   columns of the first Linears     gathered; not where that is a convolution
    mlp.hidden   (M,)   rows of the first layers, channels in between, columns of the last layer
"""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import ConvMlp, GluMlp, Mlp, SwiGLU
from timm.models.levit import LevitMlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn

from vitrim.network.dispatch import UnsupportedArchitecture
from vitrim.network.factored import layers_of
from vitrim.network.structure import Dim, Layer, Part, Site, Structure, full


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """The layers of a class of MLPs, by name.

    `opens` make the hidden units, `copies` numbers for each; `between` are depthwise convolutions
    and BatchNorms, of one channel each; `closes` reads the units.
    """

    opens: tuple[str, ...] = ("fc1",)
    copies: int = 1
    between: tuple[str, ...] = ()
    closes: str = "fc2"


_KINDS = {
    Mlp: _Kind(),
    ConvMlp: _Kind(),
    GluMlp: _Kind(copies=2),
    SwiGLU: _Kind(opens=("fc1_g", "fc1_x")),
    MlpWithDepthwiseConv: _Kind(between=("dwconv",)),
    LevitMlp: _Kind(opens=("ln1.linear",), between=("ln1.bn",), closes="ln2.linear"),
}
SUPPORTED = ", ".join(kind.__name__ for kind in _KINDS)
"""The classes of MLPs that can be cut."""


def is_mlp(module: nn.Module) -> bool:
    """Whether a module is an MLP that can be cut."""
    return type(module) in _KINDS


def mlp_of(name: str, mlp: nn.Module) -> Structure:
    """Describe the MLP at module path `name`, dense or cut.

    Raises:
        UnsupportedArchitecture: it is of another class than timm's.
    """
    kind = _KINDS.get(type(mlp))
    if kind is None:
        raise UnsupportedArchitecture(f"{name} is a {type(mlp).__name__}; supported: {SUPPORTED}")
    first, last = mlp.get_submodule(kind.opens[0]), mlp.get_submodule(kind.closes)
    hidden, wide = _columns(last), _columns(first)
    unit, read = f"{name}.hidden", f"{name}.input"
    gathers = not isinstance(first, nn.Conv2d)
    sites: tuple[Site, ...] = (Site(name=unit, size=hidden, locked=_lock(mlp)),)
    if gathers:
        sites = (Site(name=read, size=wide), *sites)
    made = (Part(site=unit, offset=0, size=hidden),)
    rows = tuple(Part(site=unit, offset=at * hidden, size=hidden) for at in range(kind.copies))
    columns = (Part(site=read, offset=0, size=wide),) if gathers else full(wide)
    dims: dict[str, tuple[Dim, Dim]] = {path: (rows, columns) for path in kind.opens}
    dims |= {path: (made, ()) for path in kind.between}
    dims[kind.closes] = full(_rows(last)), made
    layers = [
        layer
        for path, (out, inp) in dims.items()
        for layer in layers_of(
            mlp.get_submodule(path),
            Layer(
                name=f"{name}.{path}",
                branch=name,
                out=out,
                inp=inp,
                gathers=gathers and path in kind.opens,
                locked=_no_linear(mlp.get_submodule(path)),
            ),
        )
    ]
    return Structure(sites={site.name: site for site in sites}, layers=tuple(layers))


def _lock(mlp: nn.Module) -> str:
    """Return why the hidden units cannot be cut one by one, or nothing."""
    if not isinstance(getattr(mlp, "norm", None), nn.Identity | None):
        return "the hidden units are normalised"
    if any(True for _ in mlp.get_submodule("act").parameters()):
        return "their activation has parameters"
    return ""


def _no_linear(layer: nn.Module) -> str:
    match layer:
        case nn.Conv2d():
            return "it is a convolution, and factors are made of Linears only"
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            return "it is a norm, and factors are made of Linears only"
    return ""


def _columns(layer: nn.Module) -> int:
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features  # type: ignore[return-value]


def _rows(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features  # type: ignore[return-value]
