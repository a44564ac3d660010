"""Networks of transformers as equal networks of timm; transformers itself is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.model.checkpoint import fitted
from vitrim.network.skeleton import dense_skeleton
from vitrim.plan import Plan
from vitrim.store import assign

Config = Mapping[str, Any]
_EPS = 1e-6  # of timm's ViT
_ACTIVATIONS = {
    "gelu": None,
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_LIMIT = 1e-5
"""Largest difference of an output to transformers', relative to the largest output or to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """What the class of a network says: its type of config, and what it makes of the tokens."""

    type: str
    head: str  # class token, mean, pooled or none


KINDS = {
    "ViTForImageClassification": _Kind(type="vit", head="token"),
    "ViTModel": _Kind(type="vit", head="none"),
    "DeiTForImageClassification": _Kind(type="deit", head="token"),
    "DeiTForImageClassificationWithTeacher": _Kind(type="deit", head="both"),
    "Dinov2ForImageClassification": _Kind(type="dinov2", head="linear"),
    "Dinov2Model": _Kind(type="dinov2", head="none"),
    "Dinov2WithRegistersForImageClassification": _Kind(type="dinov2", head="linear"),
    "Dinov2WithRegistersModel": _Kind(type="dinov2", head="none"),
    "DINOv3ViTModel": _Kind(type="dinov3", head="none"),
    "SwinForImageClassification": _Kind(type="swin", head="mean"),
    "SwinModel": _Kind(type="swin", head="none"),
    "SiglipVisionModel": _Kind(type="siglip", head="none"),
    "SiglipForImageClassification": _Kind(type="siglip", head="mean"),
    "CLIPVisionModel": _Kind(type="clip", head="none"),
    "CLIPVisionModelWithProjection": _Kind(type="clip", head="projection"),
    "CLIPForImageClassification": _Kind(type="clip", head="mean"),
}
"""The classes of transformers that have an equal network in timm."""


def from_hf(model: nn.Module) -> nn.Module:
    """Return the network of timm that computes what a vision network of transformers computes.

    Its outputs are the logits; where the class has no classifier, the pooled output
    (`pooler_output`; for ViT, DeiT, DINOv2 and CLIP that of the class token without the pooler's
    dense layer). Both networks are run on an image of noise and compared. `description_of` gives
    the name and the arguments that a plan needs.

    Args:
        model: an instance of a class in `KINDS`; it is not modified.

    Raises:
        ConfigError: its class or an option of its config has no equal in timm, or the outputs
            differ.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    description = description_of(model)
    net = built(description, state, where=type(model).__name__)
    _compare(model, net)
    return net


def description_of(model: nn.Module) -> dict[str, object]:
    """Return timm's `name` and `args` of the network that `from_hf` returns.

    Raises:
        ConfigError: as `from_hf`.
    """
    config = cast(Config, model.config.to_dict())  # type: ignore[operator, union-attr]
    return describe(type(model).__name__, config, model.state_dict())


def built(
    description: Mapping[str, object], state: Mapping[str, Tensor], *, where: str
) -> nn.Module:
    """Return the network of a description, in eval mode, with weights of transformers.

    Raises:
        ConfigError: the weights do not fit; `where` names them.
    """
    net = dense_skeleton(description)
    fitting = fitted(state, description, net, where=where)
    return assign(net, fitting, Plan(model=description, edits=())).eval()


def describe(kind: str, config: Config, state: Mapping[str, Tensor]) -> dict[str, object]:
    """Return timm's `name` and `args` of a network of transformers.

    Args:
        kind: its class.
        config: its config, as plain data.
        state: its tensors.

    Raises:
        ConfigError: its class or an option of its config has no equal in timm.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"{kind}: no class of transformers that has an equal network in timm; these have: "
            f"{', '.join(KINDS)}"
        )
    of_kind = KINDS[kind]
    vision = config.get("vision_config", config)
    with_defaults = {"hidden_act": "gelu", "qkv_bias": True, **vision}
    head = of_kind.head
    classes = next((len(t) for key, t in state.items() if re.fullmatch(_CLASSIFIER, key)), 0)
    builder = _BUILDERS[of_kind.type]
    name, args = builder(with_defaults, head, state)
    return {"name": name, "args": {**args, "num_classes": classes}}


_CLASSIFIER = r"(classifier|cls_classifier|visual_projection)\.weight"
_GATED_OUT = r"mlp\.(down_proj|weights_out)\.weight$"


def _activation(config: Config) -> dict[str, object]:
    """Return the argument for the activation, if it is not timm's own.

    Raises:
        ConfigError: timm has no such activation.
    """
    name = config["hidden_act"]
    if name not in _ACTIVATIONS:
        raise ConfigError(f"config.hidden_act={name}: expected one of {', '.join(_ACTIVATIONS)}")
    known = _ACTIVATIONS[name]
    return {} if known is None else {"act_layer": known}


def _sizes(config: Config) -> dict[str, object]:
    """Return the arguments that all plain ViTs share.

    Raises:
        ConfigError: heads whose dims are not those of the tokens divided by their number.
    """
    dim, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = config.get("head_dim") or dim // heads
    if head_dim * heads != dim:
        raise ConfigError(
            f"config.head_dim={head_dim}: timm's networks have hidden_size / num_attention_heads "
            f"= {dim / heads:g} dims in a head"
        )
    return {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config.get("num_channels", 3),
        "embed_dim": dim,
        "depth": config["num_hidden_layers"],
        "num_heads": heads,
        **_activation(config),
    }


def _mlp_ratio(hidden: int, dim: int) -> float:
    """Return the ratio from which timm computes `hidden` units, int(dim * ratio).

    >>> _mlp_ratio(3072, 768)
    4.0
    """
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _with_mlp(config: Config) -> dict[str, object]:
    return {"mlp_ratio": _mlp_ratio(config["intermediate_size"], config["hidden_size"])}


def _with_eps(name: str, eps: float, args: dict[str, object]) -> tuple[str, dict[str, object]]:
    """Return `name`, or the network that takes the epsilon of norms where it is not timm's."""
    if eps == _EPS:
        return name, args
    return "vit_norm_eps", {**args, "norm_eps": eps}


def _vit(config: Config, head: str, state: Mapping[str, Tensor]) -> tuple[str, dict[str, object]]:
    args = {**_sizes(config), **_with_mlp(config), "qkv_bias": config["qkv_bias"]}
    return _with_eps("vit_base_patch16_224", config.get("layer_norm_eps", 1e-12), args)


def _deit(config: Config, head: str, state: Mapping[str, Tensor]) -> tuple[str, dict[str, object]]:
    """Return DeiT; the distillation token is a register where its classifier is not used."""
    args = {**_sizes(config), **_with_mlp(config), "qkv_bias": config["qkv_bias"]}
    eps = config.get("layer_norm_eps", 1e-12)
    if head == "both":
        return "vit_norm_eps", {**args, "norm_eps": eps, "distilled": True}
    return _with_eps("vit_base_patch16_224", eps, {**args, "reg_tokens": 1})


def _dinov2(
    config: Config, head: str, state: Mapping[str, Tensor]
) -> tuple[str, dict[str, object]]:
    args = {**_sizes(config), "init_values": 1.0, "qkv_bias": config["qkv_bias"]}
    _require(config, "layer_norm_eps", _EPS)
    registers = config.get("num_register_tokens", 0)
    if registers:
        args |= {"reg_tokens": registers, "no_embed_class": True}
    if config.get("use_swiglu_ffn"):
        if head == "linear":
            raise ConfigError("config.use_swiglu_ffn=true: not with a classifier; use the backbone")
        columns = next(t.shape[1] for key, t in state.items() if re.search(_GATED_OUT, key))
        args.pop("act_layer", None)
        return "vit_giant_patch14_dinov2", {
            **args,
            "mlp_ratio": _mlp_ratio(2 * columns, config["hidden_size"]),
        }
    args["mlp_ratio"] = float(config.get("mlp_ratio", 4))
    if head == "linear":
        return "dinov2_linear", args
    return "vit_small_patch14_dinov2", args


def _dinov3(
    config: Config, head: str, state: Mapping[str, Tensor]
) -> tuple[str, dict[str, object]]:
    _require(config, "layer_norm_eps", 1e-5, "key_bias", False, "mlp_bias", True)
    _require(config, "proj_bias", True)
    registers = config.get("num_register_tokens", 0)
    biased = bool(config.get("query_bias", True))
    _require(config, "value_bias", biased)
    args = {
        **_sizes(config),
        **_with_mlp(config),
        "qkv_bias": biased,
        "num_reg_tokens": registers,
        "rope_temperature": config.get("rope_theta", 100.0),
        "global_pool": "token",
    }
    if config.get("use_gated_mlp"):
        _require(config, "hidden_act", "silu")
        args.pop("act_layer", None)
        args["swiglu_align_to"] = 1
        return "vit_small_plus_patch16_dinov3", args
    return "vit_small_patch16_dinov3", args


def _swin(config: Config, head: str, state: Mapping[str, Tensor]) -> tuple[str, dict[str, object]]:
    _require(config, "layer_norm_eps", 1e-5, "use_absolute_embeddings", False, "qkv_bias", True)
    return "swin_tiny_patch4_window7_224", {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config.get("num_channels", 3),
        "embed_dim": config["embed_dim"],
        "depths": list(config["depths"]),
        "num_heads": list(config["num_heads"]),
        "window_size": config["window_size"],
        "mlp_ratio": float(config["mlp_ratio"]),
        **_activation(config),
    }


def _siglip(
    config: Config, head: str, state: Mapping[str, Tensor]
) -> tuple[str, dict[str, object]]:
    _require(config, "layer_norm_eps", _EPS)
    args = {**_sizes(config), **_with_mlp(config)}
    if head == "mean":
        return "vit_base_patch16_siglip_gap_224", args
    return "vit_base_patch16_siglip_224", args


def _clip(config: Config, head: str, state: Mapping[str, Tensor]) -> tuple[str, dict[str, object]]:
    _require(config, "layer_norm_eps", 1e-5)
    args = {**_sizes(config), **_with_mlp(config)}
    if head == "mean":
        args |= {"global_pool": "avg", "fc_norm": False, "final_norm": False}
    return "vit_base_patch16_clip_224", args


_BUILDERS = {
    "vit": _vit,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov3": _dinov3,
    "swin": _swin,
    "siglip": _siglip,
    "clip": _clip,
}


def _require(config: Config, *pairs: object) -> None:
    """Raise ConfigError unless the config has these values, or none, for its keys."""
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        found = config.get(str(key), value)
        if found != value:
            raise ConfigError(f"config.{key}={found}: timm's equal network has {value} only")


def _compare(model: nn.Module, net: nn.Module) -> None:
    """Raise ConfigError unless both networks give the same for an image of noise."""
    config = cast(Config, model.config.to_dict())  # type: ignore[operator, union-attr]
    config = config.get("vision_config", config)
    size = config["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(
        (2, config.get("num_channels", 3), height, width),
        generator=torch.Generator().manual_seed(0),
    )
    parameter = next(model.parameters())
    training = model.training
    with torch.no_grad():
        try:
            given = model.eval()(pixel_values=images.to(parameter.device, parameter.dtype))
        finally:
            model.train(training)
        expected = pooled(given, type(model).__name__).float().cpu()
        found = net(images)
    difference = float((found - expected).abs().max())
    limit = _LIMIT * max(1.0, float(expected.abs().max()))
    if parameter.dtype == torch.float32 and difference > limit:
        raise ConfigError(
            f"{type(model).__name__}: timm's network differs by {difference:.1e}, more than "
            f"{limit:.0e}: an option of its config has no equal"
        )


def pooled(outputs: Any, kind: str) -> Tensor:
    """Return what `from_hf`'s network computes, from the outputs of a network of transformers.

    Args:
        outputs: what a network of the class `kind` returns.
        kind: the class.
    """
    for name in ("logits", "image_embeds"):
        if getattr(outputs, name, None) is not None:
            return cast(Tensor, getattr(outputs, name))
    if KINDS[kind].type in ("vit", "deit", "dinov2"):
        return cast(Tensor, outputs.last_hidden_state[:, 0])
    return cast(Tensor, outputs.pooler_output)
