"""Layouts that timm loads by its own conversions: its own, and those of papers' hubs."""

from __future__ import annotations

from vitrim.model.layout.keys import Layout, exactly

_PATCHES = "patch_embed.proj.weight"
_VIT = exactly(_PATCHES, "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight")

DINOV2_CHUNKED = Layout(
    name="dinov2-hub-chunked",
    marks=exactly(_PATCHES, "blocks.0.0.norm1.weight", "blocks.0.0.attn.qkv.weight"),
    rules=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
)
DINOV3 = Layout(
    name="dinov3-hub",
    marks={**exactly("storage_tokens"), **_VIT, "blocks.0.ls1.gamma": "ls1"},
)
DINOV2 = Layout(
    name="dinov2-hub", marks={**exactly("mask_token"), **_VIT, "blocks.0.ls1.gamma": "ls1"}
)
DEIT = Layout(
    name="deit-hub",
    marks={**exactly("dist_token"), **_VIT, **exactly("head_dist.weight")},
)
TIMM_VIT = Layout(name="timm-vit", marks={**_VIT, "blocks.0.mlp.fc1.weight": r"^blocks\.0\.mlp"})
TIMM_SWIN = Layout(
    name="timm-swin",
    marks=exactly(
        _PATCHES,
        "layers.0.blocks.0.norm1.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table",
    ),
)
OPENAI_CLIP = Layout(
    name="openai-clip",
    marks=exactly(
        "visual.class_embedding",
        "visual.conv1.weight",
        "visual.transformer.resblocks.0.ln_1.weight",
    ),
)

LAYOUTS = (DINOV2_CHUNKED, DINOV3, DINOV2, DEIT, OPENAI_CLIP, TIMM_VIT, TIMM_SWIN)
