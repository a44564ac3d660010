"""What of a network can be scored: sites, layers and attentions, by the kinds of edits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from vitrim.closed_form.importance import consumer_of
from vitrim.errors import ConfigError
from vitrim.network import stream, structure
from vitrim.network.dispatch import UnsupportedArchitecture
from vitrim.network.int8 import linears_of
from vitrim.network.structure import Attention, Kind, Layer, Site, Structure

Tokens = Callable[[Tensor], Tensor]
"""Maps an activation of a layer to (B, N, channels), tokens in the order of the stream."""


class Reader(NamedTuple):
    """A Linear of which the inputs and the gradients by its outputs are gathered.

    `tokens` maps its activations to (B, N, channels); the first `prefix` of the tokens are no
    patches, and the classifier reads the first `readout`.
    """

    name: str
    tokens: Tokens
    prefix: int = 0
    readout: int = 0


KINDS: dict[Kind, str] = {"hidden": "mlp", "qk": "qk", "v": "v"}
"""The edits that remove units, by the kind of their sites."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What is scored in one network.

    Args:
        described: the network's structure.
        sites: whose units may go.
        layers: whose ranks may fall.
        readers: whose inputs and gradients are gathered.
        attentions: whose queries and keys are gathered.
        int8: layers whose weights may be int8.
        drops: whether branches may go.
    """

    described: Structure
    sites: tuple[Site, ...]
    layers: tuple[Layer, ...]
    readers: tuple[Reader, ...]
    attentions: tuple[Attention, ...]
    int8: tuple[str, ...]
    drops: bool


def parts_of(
    net: nn.Module, kinds: Collection[str], layers: Collection[str] | None = None
) -> Parts:
    """Return what of a network is scored for these kinds of edits.

    Args:
        net: the network.
        kinds: of edits.
        layers: whose ranks may fall; None: of all layers.
    """
    described = structure(net)
    sites = tuple(s for s in sites_of(described, kinds) if _is_read(net, described, s))
    ranked = [x for x in factorisable(described, kinds) if layers is None or x.name in layers]
    linear = tuple(layer for layer in ranked if _is_linear(net, layer.name))
    read = [consumer_of(described, site.name).name for site in sites if site.kind != "qk"]
    int8 = tuple(linears_of(net)) if "int8" in kinds else ()
    names = dict.fromkeys([*read, *(layer.name for layer in linear), *int8])
    own = {site.name for site in sites}
    return Parts(
        described=described,
        sites=sites,
        layers=linear,
        readers=tuple(_readers(net, described, [*names])),
        attentions=tuple(a for a in described.attentions if a.qk in own),
        int8=int8,
        drops="branches" in kinds,
    )


def parts_of_sites(net: nn.Module, names: Collection[str]) -> Parts:
    """Return what of a network is scored for these sites; heads cost what their values cost.

    Raises:
        ConfigError: the units of a site are not read by a Linear.
    """
    described = structure(net)
    sites = tuple(described.sites[name] for name in names)
    read: list[str] = []
    for site in sites:
        if site.kind == "qk":
            continue
        units = _values_of(described, site)
        if site.kind == "channels" or not _is_read(net, described, units):
            raise ConfigError(
                f"method.scope=loss: the losses of {site.name} are not predicted, as no Linear "
                "reads its units; set method.scope=site or global, or choose other method.sites"
            )
        read.append(consumer_of(described, units.name).name)
    return Parts(
        described=described,
        sites=sites,
        layers=(),
        readers=tuple(_readers(net, described, [*dict.fromkeys(read)])),
        attentions=tuple(a for a in described.attentions if a.qk in {*names}),
        int8=(),
        drops=False,
    )


def _values_of(described: Structure, site: Site) -> Site:
    """Return the site of the values of these heads; any other site itself."""
    values = {attention.heads: attention.v for attention in described.attentions}
    return described.sites[values.get(site.name, site.name)]


def sites_of(described: Structure, kinds: Collection[str]) -> list[Site]:
    """Return the sites whose units may go by these kinds of edits."""
    return [
        site
        for site in described.sites.values()
        if KINDS.get(site.kind) in kinds and not site.locked_reason and _can_rotate(described, site)
    ]


def factorisable(described: Structure, kinds: Collection[str]) -> list[Layer]:
    """Return the layers whose ranks may fall by these kinds of edits."""
    return [
        layer
        for layer in described.layers
        if "ranks" in kinds and layer.inp and not layer.factor and not layer.locked_reason
    ]


def _can_rotate(described: Structure, site: Site) -> bool:
    """Whether the units of a site may be combined, or are single units.

    Values are not, where a gate multiplies them one by one.
    """
    if site.kind not in ("qk", "v"):
        return True
    made_by = [layer for layer in described.layers if any(p.site == site.name for p in layer.out)]
    return len(made_by) == 1 or not any(layer.name.endswith(".gate") for layer in made_by)


def _readers(net: nn.Module, described: Structure, names: list[str]) -> list[Reader]:
    branch_of = {layer.name: layer.branch for layer in described.layers}
    try:
        of_net = stream(net)
    except UnsupportedArchitecture:
        return [Reader(name, _flat) for name in names]
    tokens = {branch.name: branch.tokens for branch in of_net.branches}
    return [
        Reader(
            name,
            tokens.get(branch_of.get(name, ""), _flat),
            of_net.n_prefix_tokens,
            of_net.n_readout_tokens,
        )
        for name in names
    ]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)


def _is_read(net: nn.Module, described: Structure, site: Site) -> bool:
    return site.kind == "qk" or _is_linear(net, consumer_of(described, site.name).name)


def _is_linear(net: nn.Module, name: str) -> bool:
    return net.get_parameter(f"{name}.weight").ndim == 2
