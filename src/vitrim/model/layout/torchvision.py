"""torchvision's `vit_*` and `swin_{t,s,b}`, in timm's names."""

from __future__ import annotations

import re
from collections.abc import Collection

from vitrim.model.layout.keys import Layout, State, exactly

_SWIN_STAGE = re.compile(r"features\.(\d+)\.(.+)")


def _with_swin_names(state: State, expected: Collection[str]) -> State:
    """Return the state with stages in place of a sequence: blocks at odd places, merging at even.

    timm merges patches at the beginning of a stage, so that both have the number of the stage.
    """
    result: State = {}
    for key, tensor in state.items():
        found = _SWIN_STAGE.fullmatch(key)
        if found is None:
            result[key] = tensor
            continue
        place, rest = int(found[1]), found[2]
        inner = f"blocks.{rest}" if place % 2 else f"downsample.{rest}"
        result[f"layers.{place // 2}.{inner}"] = tensor
    return result


VIT = Layout(
    name="torchvision-vit",
    marks=exactly(
        "class_token",
        "conv_proj.weight",
        "encoder.pos_embedding",
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
    ),
    rules=(
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
    ),
)
SWIN = Layout(
    name="torchvision-swin",
    marks=exactly(
        "features.0.0.weight",
        "features.1.0.attn.qkv.weight",
        "features.1.0.attn.relative_position_bias_table",
    ),
    rules=(
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
    ),
    dropped=r"\.relative_position_index$",
    arrange=_with_swin_names,
)

LAYOUTS = (VIT, SWIN)
