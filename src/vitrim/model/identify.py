"""Which network of timm a network at hand is: its name and arguments, found and proved.

The network's own weights are assigned to the network that timm builds by that name, and both must
have the same logits. What comes out is plain: without hooks, wrappers and compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitrim.errors import ConfigError, VitrimError
from vitrim.network import structure
from vitrim.network.family import sequential_head
from vitrim.network.proof import difference, input_shape, stem_channels
from vitrim.network.skeleton import dense_skeleton
from vitrim.plan import Plan
from vitrim.store import assign, mismatches

_ROUNDS = 4
_BASIC = ("num_classes", "in_chans", "img_size")
"""Arguments of most networks of timm."""
_NAME_EPS = "vit_norm_eps"
_Net = Any
"""A network of any class of timm, or a part of one, whose attributes are tried."""
_Probe = Callable[[_Net], object]
_Model = Mapping[str, Any]
"""`name` and `args` of a network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identified:
    """A network at hand as timm builds it.

    Args:
        model: its `name` and `args`, as a plan states them.
        net: the equal plain network, in eval mode on CPU, in float32; its tensors are copies.
        dtype: of the network at hand.
        device: of the network at hand.
    """

    model: Mapping[str, object]
    net: nn.Module
    dtype: torch.dtype
    device: torch.device


def identify(net: nn.Module, model: Mapping[str, object] | None = None) -> Identified:
    """Find timm's name and arguments of `net`, and prove them by equal logits of a fixed input.

    Args:
        net: a network of timm, compiled or not, on any device, in any float type; not modified.
        model: its `name` and `args`, if they are known; None: they are found.

    Raises:
        ConfigError: it has no weights, holds the network inside, or computes something else than
            any network that timm builds by its name.
    """
    net = unwrapped(net)
    _check(net)
    problems: list[str] = []
    for candidate in (model,) if model is not None else _candidates(net):
        twin, problem = _twin(net, candidate)
        if twin is not None:
            parameter = next(net.parameters())
            return Identified(
                model=candidate, net=twin.float(), dtype=parameter.dtype, device=parameter.device
            )
        problems.append(problem)
    raise ConfigError(
        f"{type(net).__name__}: this is no network that timm builds as {_named(net)}: "
        f"{problems[0] if problems else 'timm has no name for it'}{_way_out(net)}"
    )


def unwrapped(net: nn.Module) -> nn.Module:
    """Return the network inside torch.compile's and the parallel wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(net, wrappers) or hasattr(net, "_orig_mod"):
        net = cast(nn.Module, net.module if isinstance(net, wrappers) else net._orig_mod)
    return net


def at_path(net: nn.Module, path: str | None, key: str = "backbone") -> nn.Module:
    """Return the network at module path `path` of `net`; None: `net` itself.

    Raises:
        ConfigError: there is no such module; `key` is the argument that named it.
    """
    if path is None:
        return net
    try:
        return unwrapped(net).get_submodule(path)
    except AttributeError:
        names = ", ".join(cuttable(unwrapped(net))) or "none of its modules"
        raise ConfigError(
            f"{key}={path!r}: {type(net).__name__} has no such module; can be compressed: {names}"
        ) from None


def cuttable(net: nn.Module) -> list[str]:
    """Return the paths of the modules inside `net` that are networks which can be cut."""
    handled = structure.registry.keys() - {object, nn.Module}
    paths: list[str] = []
    for path, module in net.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in paths)
        if path and not inside and isinstance(module, tuple(handled)):
            paths.append(path)
    return paths


def _check(net: nn.Module) -> None:
    """Raise ConfigError if `net` has no weights, or is no network that can be cut."""
    tensors = [*net.parameters(), *net.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ConfigError(
            f"{type(net).__name__} is on the meta device, without weights: load its weights first"
        )
    paths = cuttable(net)
    handled = tuple(structure.registry.keys() - {object, nn.Module})
    if isinstance(net, handled):
        return
    if paths:
        raise ConfigError(
            f"{type(net).__name__} is no network of timm that can be cut, but holds one: give "
            f"its path, backbone={' or '.join(repr(path) for path in paths)}"
        )
    structure(net)  # raises, naming the supported classes


def _named(net: nn.Module) -> str:
    names = [*dict.fromkeys(str(model["name"]) for model in _names(net))]
    return " or ".join(names) or "any network"


def _names(net: nn.Module) -> Iterator[_Model]:
    """Iterate over the names that `net` may have, with no arguments."""
    config = getattr(net, "pretrained_cfg", None) or {}
    name, tag = config.get("architecture"), config.get("tag")
    if name:
        yield {"name": name, "args": {}}
        if tag:
            yield {"name": f"{name}.{tag}", "args": {}}
    elif isinstance(net, VisionTransformer):
        yield {"name": "vit_base_patch16_224", "args": {}}
    if isinstance(net, VisionTransformer) and _eps(net) not in (None, 1e-6):
        yield {"name": _NAME_EPS, "args": {"norm_eps": _eps(net)}}


def _candidates(net: nn.Module) -> Iterator[_Model]:
    """Iterate over names with the arguments in which `net` differs from timm's network."""
    for model in _with_own_head(net, _names(net)):
        args = dict(model["args"])
        for _ in range(_ROUNDS):
            try:
                skeleton = dense_skeleton({"name": model["name"], "args": args})
            except VitrimError:
                break
            found = _differing(net, skeleton)
            if "head" in args:  # whose last layer says it
                found.pop("num_classes", None)
            if all(args.get(key, ...) == value for key, value in found.items()):
                break
            args |= found
        yield {"name": model["name"], "args": args}
        basic = {key: value for key, value in args.items() if key in (*_BASIC, "network", "head")}
        if basic != args and "norm_eps" not in args:
            yield {"name": model["name"], "args": basic}


def _with_own_head(net: nn.Module, models: Iterable[_Model]) -> Iterator[_Model]:
    """Iterate over `models`, with the head of `net` among their arguments if it is a Sequential."""
    own = sequential_head.head_of(net)
    spec = "" if own is None else sequential_head.spec_of(own)
    for model in models:
        if isinstance(spec, str):
            yield model
        else:
            args = {**model["args"], "network": model["name"], "head": spec}
            yield {"name": sequential_head.NAME, "args": args}


def _twin(net: nn.Module, model: Mapping[str, object]) -> tuple[nn.Module | None, str]:
    """Return the network of `model` with copies of the weights of `net`, or why it is another."""
    state = {
        key.replace("_orig_mod.", ""): value.detach().cpu().clone()
        for key, value in net.state_dict().items()
    }
    try:
        twin = dense_skeleton(model)
    except VitrimError as error:
        return None, str(error)
    wrong = mismatches(twin, state)
    if wrong:
        return None, "; ".join(wrong[:3])
    twin = assign(twin, state, Plan(model=model, edits=())).eval()
    parameter = next(net.parameters())
    device = parameter.device
    try:
        shape = input_shape(twin, cast(Mapping[str, object], model["args"]).get("img_size"))
        problem, _ = difference(net, twin.to(device), shape)
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        return None, f"it cannot process its own images: {' '.join(str(error).split())[:200]}"
    return (None, problem) if problem else (twin.to("cpu"), "")


def _way_out(net: nn.Module) -> str:
    """Return what a user can do, by what is special about `net`."""
    classes = getattr(net, "num_classes", None)
    head = sequential_head.head_of(net)
    if head is not None:
        reason = sequential_head.spec_of(head)
        words = f" ({reason})" if isinstance(reason, str) else ""
        return (
            f"; it has a head of its own{words}: take it off (head = net.head; "
            "net.reset_classifier(0)), compress, and put it on the result (net.head = head)"
        )
    return (
        "; if you know how timm builds it, say so: network={'name': ..., 'args': {"
        f"'num_classes': {classes}, ...}}}}; a network with code of its own can be saved by "
        "torch.export"
    )


def _first_block(net: _Net) -> _Net:
    """Return the first block of a ViT, or of the first stage of a Swin; None where unknown."""
    stages = getattr(net, "layers", None) or getattr(net, "stages", None)
    blocks = getattr(stages[0], "blocks", None) if stages else getattr(net, "blocks", None)
    return blocks[0] if blocks else None


def _eps(net: nn.Module) -> float | None:
    eps = getattr(getattr(_first_block(net), "norm1", None), "eps", None)
    return eps if isinstance(eps, float) else None


def _of_patches(name: str) -> _Probe:
    def value(net: _Net) -> object:
        found = getattr(getattr(net, "patch_embed", None), name, None)
        if isinstance(found, tuple) and len({*found}) == 1:
            return found[0]
        return [*found] if isinstance(found, tuple) else found

    return value


def _width(net: _Net) -> int | None:
    projection = getattr(getattr(net, "patch_embed", None), "proj", None)
    return projection.out_channels if isinstance(projection, nn.Conv2d) else None


def _stages(count: _Probe) -> _Probe:
    def value(net: _Net) -> object:
        stages = getattr(net, "layers", None)
        if not stages or not all(hasattr(stage, "blocks") for stage in stages):
            return None
        return [count(stage) for stage in stages]

    return value


def _heads(net: _Net) -> object:
    return getattr(getattr(_first_block(net), "attn", None), "num_heads", None)


def _mlp_ratio(net: _Net) -> float | None:
    layer = getattr(getattr(_first_block(net), "mlp", None), "fc1", None)
    if not isinstance(layer, nn.Linear):
        return None
    ratio = layer.out_features / layer.in_features
    exact = int(layer.in_features * ratio) == layer.out_features
    return ratio if exact else (layer.out_features + 0.5) / layer.in_features


def _activation(net: _Net) -> str | None:
    """Return timm's name of the activation of the MLPs."""
    layer = getattr(getattr(_first_block(net), "mlp", None), "act", None)
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_tanh"
    names = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "QuickGELUTanh": None}
    if layer is None or names.get(type(layer).__name__, ...) is None:
        return None
    return names.get(type(layer).__name__) or type(layer).__name__.lower()


def _has_bias(net: _Net) -> bool | None:
    qkv = getattr(getattr(_first_block(net), "attn", None), "qkv", None)
    return qkv.bias is not None if isinstance(qkv, nn.Linear) else None


def _scale(net: _Net) -> float | None:
    """Return 1.0 if layers are scaled; its value does not matter, since weights follow."""
    block = _first_block(net)
    scaled = isinstance(getattr(getattr(block, "ls1", None), "gamma", None), Tensor)
    return 1.0 if scaled else None


def _is_vit(net: _Net) -> bool:
    return hasattr(net, "blocks") and hasattr(net, "has_class_token")


def _of_vit(name: str, value: _Probe) -> tuple[str, _Probe]:
    return name, lambda net: value(net) if _is_vit(net) else None


_PROBES: tuple[tuple[str, _Probe], ...] = (
    ("num_classes", lambda net: getattr(net, "num_classes", None)),
    ("in_chans", stem_channels),
    ("img_size", _of_patches("img_size")),
    ("patch_size", _of_patches("patch_size")),
    ("embed_dim", _width),
    ("depth", lambda net: len(net.blocks) if _is_flat(net) else None),
    ("num_heads", lambda net: _heads(net) if _is_flat(net) else None),
    ("depths", _stages(lambda stage: len(stage.blocks))),
    ("num_heads", _stages(lambda stage: getattr(stage.blocks[0].attn, "num_heads", None))),
    (
        "window_size",
        lambda net: (
            _one(getattr(_first_block(net), "window_size", None))
            if hasattr(net, "layers")
            else None
        ),
    ),
    ("mlp_ratio", _mlp_ratio),
    ("qkv_bias", _has_bias),
    ("act_layer", _activation),
    ("init_values", _scale),
    ("global_pool", lambda net: _text(getattr(net, "global_pool", None))),
    _of_vit("class_token", lambda net: net.has_class_token),
    _of_vit("reg_tokens", lambda net: net.num_reg_tokens),
    _of_vit("no_embed_class", lambda net: net.no_embed_class),
    _of_vit("dynamic_img_size", lambda net: net.dynamic_img_size),
    _of_vit("fc_norm", lambda net: not isinstance(net.fc_norm, nn.Identity)),
    _of_vit("final_norm", lambda net: not isinstance(net.norm, nn.Identity) or _fc_norm(net)),
    _of_vit("pre_norm", lambda net: not isinstance(net.norm_pre, nn.Identity)),
    _of_vit("qk_norm", lambda net: not isinstance(net.blocks[0].attn.q_norm, nn.Identity)),
)
"""Arguments of timm's networks, and how to read each from a network; None: it has none."""


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _fc_norm(net: _Net) -> bool:
    return not isinstance(net.fc_norm, nn.Identity)


def _is_flat(net: _Net) -> bool:
    """Whether all blocks are in one list, with equal attentions."""
    blocks = getattr(net, "blocks", None)
    return isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(blocks[0], "attn")


def _one(size: object) -> object:
    pair = isinstance(size, tuple) and len({*size}) == 1
    return cast(tuple[object, ...], size)[0] if pair else size


def _differing(net: nn.Module, skeleton: nn.Module) -> dict[str, object]:
    """Return the arguments whose value in `net` is another than in `skeleton`."""
    found: dict[str, object] = {}
    for name, probe in _PROBES:
        try:
            own, known = probe(net), probe(skeleton)
        except (AttributeError, TypeError, IndexError):
            continue
        if own is None and name != "init_values":
            continue
        if own != known:
            found[name] = own
    return found
