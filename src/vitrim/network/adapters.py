"""The layers of a compact network that adapters, such as those of the library PEFT, are put on.

A cut or factorised layer of a compact network consists of Linears. Adapters belong on these, not on
the layer itself: only then can they be merged into its weights, and it stays as small as it is.
"""

from __future__ import annotations

from torch import nn

from vitrim.errors import VitrimError
from vitrim.network.attention import GatheredLinear
from vitrim.network.dispatch import UnsupportedArchitecture, structure
from vitrim.network.factored import LowRankLinear, SplitLinear
from vitrim.network.int8_linear import Int8Linear


class AdapterError(VitrimError):
    """A name that no layer has, or a layer on which adapters would do nothing."""


def adapter_targets(net: nn.Module, *names: str) -> list[str]:
    """Return the paths of the layers to put adapters on, in the order of the network.

    >>> import timm
    >>> net = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> adapter_targets(net, "qkv", "fc1")
    ['blocks.0.attn.qkv', 'blocks.0.mlp.fc1']

    Args:
        net: a network of timm, dense or compact.
        names: paths, or the last parts of paths, of layers of the dense network. By default all
            Linears are named, except for the classifier and for those that the network never calls.

    Raises:
        AdapterError: no layer has one of the names, or a named layer is in int8 or never called:
            then adapters would do nothing.
    """
    uncalled = _uncalled(net)
    classifier = {id(module) for module in _classifier(net).modules()}
    targets: dict[str, list[str]] = {name: [] for name in names}
    defaults = []
    for path, module in net.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | Int8Linear):
            continue
        dense = _dense_path(net, path)
        for name in names:
            if dense == name or dense.endswith(f".{name}"):
                _check(dense, module, uncalled)
                targets[name].append(path)
        if isinstance(module, nn.Linear) and id(module) not in classifier and dense not in uncalled:
            defaults.append(path)
    for name in names:
        if not targets[name]:
            raise AdapterError(f"no layer is named {name!r}: expected one of {_last_parts(net)}")
    chosen = {path for paths in targets.values() for path in paths}
    return [path for path, _ in net.named_modules() if path in chosen] if names else defaults


def _check(dense: str, module: nn.Module, uncalled: set[str]) -> None:
    if isinstance(module, Int8Linear):
        raise AdapterError(
            f"{dense} is in int8, which cannot be trained: put adapters on the network in float "
            "and round it to int8 after merging"
        )
    if dense in uncalled:
        raise AdapterError(
            f"{dense}: the network reads the weight of this layer and does not call it, so an "
            "adapter would do nothing; name other layers"
        )


def _uncalled(net: nn.Module) -> set[str]:
    """Return the layers whose weights the network reads without calling them."""
    try:
        return {layer.name for layer in structure(net).layers if layer.positions_from}
    except UnsupportedArchitecture:
        return set()


def _classifier(net: nn.Module) -> nn.Module:
    """Return the classifier of a network of timm; an empty module where it has none."""
    get_classifier = getattr(net, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else None
    heads = found if isinstance(found, tuple) else (found,)
    return nn.ModuleList(head for head in heads if isinstance(head, nn.Module))


def _dense_path(net: nn.Module, path: str) -> str:
    """Return the path of the layer, in the dense network, that the one at `path` is part of."""
    parent = path.rpartition(".")[0]
    while parent and isinstance(
        net.get_submodule(parent), GatheredLinear | LowRankLinear | SplitLinear
    ):
        path, parent = parent, parent.rpartition(".")[0]
    return path


def _last_parts(net: nn.Module) -> str:
    """Return the last parts of the paths of all Linears, each once."""
    paths = [
        _dense_path(net, path)
        for path, module in net.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths)) or "none"
