"""`sequential_head`: a network of timm whose classifier is an nn.Sequential of known layers.

timm's networks end in one Linear. The layers of another head are arguments of this name, so that a
plan states them: one list per layer, with its name in the Sequential, its kind and its numbers,
such as [["0", "Linear", 192, 64, True], ["1", "GELU", "none"], ["2", "Linear", 64, 10, True]].
The network itself is timm's, and its head is not cut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import timm
from timm.models import register_model
from torch import nn

from vitrim.network.dispatch import UnsupportedArchitecture, structure

NAME = "sequential_head"
Spec = list[list[object]]
_Numbers = Callable[[nn.Module], tuple[object, ...]]

LAYERS: dict[type[nn.Module], _Numbers] = {
    nn.Linear: lambda m: (m.in_features, m.out_features, m.bias is not None),
    nn.LayerNorm: lambda m: (m.normalized_shape[0], m.eps, m.elementwise_affine),  # type: ignore[index]
    nn.BatchNorm1d: lambda m: (m.num_features, m.eps, m.momentum, m.affine),
    nn.Dropout: lambda m: (m.p,),
    nn.GELU: lambda m: (m.approximate,),
    **dict.fromkeys((nn.Identity, nn.ReLU, nn.SiLU, nn.Tanh), lambda m: ()),
}
"""The layers that a head may have, and the first arguments from which each is built again."""
_KINDS = {kind.__name__: kind for kind in LAYERS}


def head_of(net: nn.Module) -> nn.Sequential | None:
    """Return the head of `net` if it is a Sequential; None if it is timm's own."""
    name = (getattr(net, "pretrained_cfg", None) or {}).get("classifier")
    path = name if isinstance(name, str) else "head"
    modules = dict(net.named_modules())
    for place in (path, path.rpartition(".")[0]):  # a layer in it is the classifier for timm
        if place and isinstance(head := modules.get(place), nn.Sequential):
            return head
    return None


def spec_of(head: nn.Sequential) -> Spec | str:
    """Return the layers of a head, from which `sequential_head` builds it, or why it cannot."""
    if type(head) is not nn.Sequential:
        return f"{type(head).__name__} is a class of its own"
    for name, layer in head.named_children():
        if type(layer) not in LAYERS:
            return f"layer {name} is a {type(layer).__name__}, not one of {', '.join(_KINDS)}"
    if not any(isinstance(layer, nn.Linear) for layer in head):
        return "it has no Linear, whose outputs are the classes"
    return [
        [name, type(layer).__name__, *LAYERS[type(layer)](layer)]
        for name, layer in head.named_children()
    ]


@register_model  # type: ignore[untyped-decorator]
def sequential_head(
    pretrained: bool = False,
    *,
    network: str = "",
    head: Spec | None = None,
    num_classes: int | None = None,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    **kwargs: object,
) -> nn.Module:
    """A network of timm, `network`, with the layers of `head` in place of its classifier.

    Args:
        pretrained: must be false: timm has no weights of it.
        network: timm's name.
        head: its layers (`spec_of`).
        num_classes: outputs of its last Linear; None: what `head` says.
        pretrained_cfg: not used, as are the next two, which timm passes to every network.
        pretrained_cfg_overlay: not used.
        cache_dir: not used.
        **kwargs: further arguments of timm.create_model for `network`.

    Raises:
        UnsupportedArchitecture: there is no network or no head, the head has another layer, or the
            network's classifier has another place than a layer that is never cut.
    """
    if not network or not head or network.partition(".")[0] == NAME or pretrained:
        raise UnsupportedArchitecture(
            f"{NAME} is a head on another network, without pretrained weights; supported: its "
            "arguments network, a name of timm, and head, a list of layers"
        )
    net: nn.Module = timm.create_model(network, pretrained=False, num_classes=0, **kwargs)
    if kwargs.get("features_only"):
        return net
    config: dict[str, object] = {**net.pretrained_cfg}  # type: ignore[dict-item]
    path = _place(net, config.get("classifier"))
    layers = OrderedDict((str(name), _built(str(kind), numbers)) for name, kind, *numbers in head)
    last = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)][-1]
    if num_classes is not None:
        width, _, has_bias = LAYERS[nn.Linear](layers[last])
        layers[last] = _built("Linear", (width, num_classes, has_bias))
    net.set_submodule(path, nn.Sequential(layers))
    n_classes = layers[last].out_features
    net.num_classes = n_classes
    config |= {"num_classes": n_classes, "classifier": f"{path}.{last}"}
    net.pretrained_cfg = net.default_cfg = config  # type: ignore[assignment]
    return net


def _built(kind: str, numbers: Sequence[object]) -> nn.Module:
    if kind not in _KINDS:
        raise UnsupportedArchitecture(
            f"{NAME}: a head has no layer {kind!r}; supported: {', '.join(_KINDS)}"
        )
    return _KINDS[kind](*numbers)


def _place(net: nn.Module, classifier: object) -> str:
    """Return the path of the classifier of `net`, which reads features that are never cut."""
    path = classifier if isinstance(classifier, str) else ""
    part = net.get_submodule(path) if path in dict(net.named_modules()) else None
    cut = any(f"{layer.name}.".startswith(f"{path}.") for layer in structure(net).layers)
    if not isinstance(part, nn.Identity) or cut:
        raise UnsupportedArchitecture(
            f"{NAME}: the classifier of {type(net).__name__} is cut with it; supported: networks "
            "with a classifier that is not"
        )
    return path
