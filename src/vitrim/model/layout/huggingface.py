"""Vision networks of transformers, one layout a class, in timm's names.

The rules accept the keys of files (of any version) and those of networks in memory, which
transformers 5 renames.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from vitrim.model.layout.keys import Layout, Rules, State, fused

_NET = r"^((vit|deit|dinov2|dinov2_with_registers|dinov3_vit|swin|vision_model)\.)?"
_PATCHES = _NET + r"embeddings\.patch_embeddings\.projection\.weight$"
_LAYER = _NET + r"(encoder\.|model\.)?layers?\.0\."
_QUERY = r"attention\.(attention\.query|q_proj)\.weight$"
_ATTENTION: Rules = (
    (r"\.attention\.(attention|self)\.(query|key|value)\.", r".attn.\2."),
    (r"\.attn\.(q|k|v)[a-z]+\.", r".attn.\1."),
    (r"\.(attention|self_attn)\.(q|k|v)_proj\.", r".attn.\2."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
)
_MLP: Rules = ((r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."))
_BLOCKS: Rules = (
    *_ATTENTION,
    *_MLP,
    (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
)
_EMBEDDINGS: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
)
_VIT: Rules = (
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    *_EMBEDDINGS,
    *_BLOCKS,
    (r"^layernorm\.", "norm."),
)
_TOWER: Rules = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    *_BLOCKS,
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def _with_distillation(state: State, expected: Collection[str]) -> State:
    """Return the state of DeiT; its distillation token is a register in a ViT without the head."""
    state = fused(state)
    if "dist_token" in state and "dist_token" not in expected and "reg_token" in expected:
        state["reg_token"] = state.pop("dist_token")
    return state


def _with_registers(state: State, expected: Collection[str]) -> State:
    """Return the state of DINOv2 with the position of the class token added to that token.

    timm's networks with registers have positions for patches only. In a network with the linear
    head the names of all others begin with `backbone.`. Gated MLPs have one layer for the gate and
    what it multiplies, in this order.
    """
    state = fused(state)
    for key in [key for key in state if ".mlp.gate_proj." in key]:
        up = state.pop(key.replace("gate_proj", "up_proj"))
        state[key.replace("gate_proj", "fc1")] = torch.cat([state.pop(key), up])
    if "reg_token" in state and "cls_token" in state and "pos_embed" in state:
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    if "backbone.cls_token" in expected:
        state = {k if k.startswith("linear_head.") else f"backbone.{k}": state[k] for k in state}
    return state


def _of_eva(state: State, expected: Collection[str]) -> State:
    """Return the state of DINOv3 as timm's Eva has it: query and value biases are parameters.

    Biases that are zero are left out for a network without them, as timm does.
    """
    state = _up_projected(state)
    if state.get("reg_token") is not None and not state["reg_token"].numel():
        del state["reg_token"]
    biases = {key: tensor for key, tensor in state.items() if key.endswith((".q.bias", ".v.bias"))}
    rest = {key: tensor for key, tensor in state.items() if key not in biases}
    named = {re.sub(r"\.(q|v)\.bias$", r".\1_bias", key): t for key, t in biases.items()}
    return fused(rest) | {k: t for k, t in named.items() if k in expected or bool(t.any())}


def _of_tower(state: State, expected: Collection[str]) -> State:
    """Return the state of CLIP or SigLIP with tokens as timm shapes them, and a head with a bias.

    SigLIP pools by attention, of which timm has the query apart from keys and values. CLIP's
    classifier reads the mean of tokens before the last norm, which such a network does not have.
    """
    state = fused(state)
    if "norm_pre.weight" in state and "norm.weight" not in expected and "head.weight" in expected:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("norm.")}
    for name in ("cls_token", "pos_embed"):
        if name in state:
            state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    if "head.weight" in state and "head.bias" not in state:
        state["head.bias"] = torch.zeros(len(state["head.weight"]))
    for kind in ("weight", "bias"):
        joined = state.pop(f"attn_pool.in_proj_{kind}", None)
        if joined is not None:
            dim = len(joined) // 3
            state[f"attn_pool.q.{kind}"] = joined[:dim]
            state[f"attn_pool.kv.{kind}"] = joined[dim:]
    return state


def _up_projected(state: State) -> State:
    """Return the state with the MLP's input layer named: the second of two where it is gated."""
    return {key.replace(".mlp.up_proj.", f".mlp.{_up(key, state)}."): t for key, t in state.items()}


def _up(key: str, state: State) -> str:
    block = key.partition(".mlp.")[0]
    return "fc1_x" if f"{block}.mlp.fc1_g.weight" in state else "fc1"


def _merging_first(state: State, expected: Collection[str]) -> State:
    """Return the state of Swin with patches merged at the beginning of a stage, as in timm."""
    result: State = {}
    for key, tensor in fused(state).items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1)
        result[".".join(parts)] = tensor
    return result


VIT = Layout(
    name="transformers-vit",
    marks={
        "vit.embeddings.patch_embeddings.projection.weight": _PATCHES,
        "vit.encoder.layer.0.layernorm_before.weight": _LAYER + r"layernorm_before\.weight$",
        "vit.encoder.layer.0.attention.attention.query.weight": _LAYER + _QUERY,
    },
    rules=(*_VIT, (r"^classifier\.", "head.")),
    dropped=r"^(pooler\.|embeddings\.mask_token$|decoder\.)",
    arrange=fused,
)
DEIT = Layout(
    name="transformers-deit",
    marks={
        **VIT.marks,
        "deit.embeddings.distillation_token": _NET + r"embeddings\.distillation_token$",
    },
    rules=(
        *_VIT,
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    ),
    dropped=VIT.dropped,
    arrange=_with_distillation,
)
DINOV2 = Layout(
    name="transformers-dinov2",
    marks={
        "dinov2.embeddings.patch_embeddings.projection.weight": _PATCHES,
        "dinov2.encoder.layer.0.layer_scale1.lambda1": _LAYER + r"layer_scale1\.lambda1$",
        "dinov2.encoder.layer.0.attention.attention.query.weight": _LAYER + _QUERY,
    },
    rules=(
        *_VIT,
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
        (r"^classifier\.", "linear_head."),
    ),
    dropped=r"^embeddings\.mask_token$",
    arrange=_with_registers,
)
DINOV3 = Layout(
    name="transformers-dinov3",
    marks={
        "embeddings.patch_embeddings.weight": _NET + r"embeddings\.patch_embeddings\.weight$",
        "layer.0.layer_scale1.lambda1": _LAYER + r"layer_scale1\.lambda1$",
        "layer.0.mlp.up_proj.weight": _LAYER + r"mlp\.up_proj\.weight$",
    },
    rules=(
        (r"^dinov3_vit\.", ""),
        *_EMBEDDINGS,
        (r"^embeddings\.register_tokens$", "reg_token"),
        *_BLOCKS,
        (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
        (r"^classifier\.", "head."),
    ),
    dropped=r"^embeddings\.mask_token$",
    arrange=_of_eva,
)
SWIN = Layout(
    name="transformers-swin",
    marks={
        "swin.embeddings.patch_embeddings.projection.weight": _PATCHES,
        "swin.encoder.layers.0.blocks.0.layernorm_before.weight": (
            _NET + r"encoder\.layers\.0\.blocks\.0\.layernorm_before\.weight$"
        ),
        "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table": (
            _NET + r"encoder\.layers\.0\.blocks\.0\.attention\..*relative_position_bias_table$"
        ),
    },
    rules=(
        (r"^swin\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^encoder\.layers\.", "layers."),
        (
            r"\.attention\.(self\.|relative_position_bias\.)?relative_position_bias_table$",
            ".attn.relative_position_bias_table",
        ),
        *_ATTENTION,
        *_MLP,
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head.fc."),
    ),
    dropped=r"(\.relative_position_index$|^embeddings\.mask_token$|^decoder\.)",
    arrange=_merging_first,
)
CLIP = Layout(
    name="transformers-clip",
    marks={
        "vision_model.embeddings.class_embedding": _NET + r"embeddings\.class_embedding$",
        "vision_model.pre_layrnorm.weight": _NET + r"pre_layrnorm\.weight$",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": (
            _LAYER + r"self_attn\.q_proj\.weight$"
        ),
    },
    rules=(*_TOWER, (r"^visual_projection\.", "head.")),
    dropped=r"\.position_ids$",
    arrange=_of_tower,
)
SIGLIP = Layout(
    name="transformers-siglip",
    marks={
        "vision_model.embeddings.patch_embedding.bias": _NET
        + r"embeddings\.patch_embedding\.bias$",
        "vision_model.embeddings.position_embedding.weight": (
            _NET + r"embeddings\.position_embedding\.weight$"
        ),
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": (
            _LAYER + r"self_attn\.q_proj\.weight$"
        ),
    },
    rules=(
        *_TOWER,
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.in_proj_", "attn_pool.in_proj_"),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
    ),
    dropped=r"\.position_ids$",
    arrange=_of_tower,
)


LAYOUTS = (DEIT, VIT, DINOV2, DINOV3, SWIN, CLIP, SIGLIP)
