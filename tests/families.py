"""Small networks of the families besides the plain ViT, Swin and the convolutional ones.

By family: timm's name, the arguments that make it small, and the kinds of its sites.
"""

from __future__ import annotations

from typing import Any

import timm
from packaging.version import Version

CALLED = ("attn.input", "attn.heads", "attn.v", "mlp.input", "mlp.hidden")
BY_HAND = ("attn.heads", "attn.v", "mlp.input", "mlp.hidden")
UNITS = ("mlp.input", "mlp.hidden")
VIT = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 7}
EVA = {**VIT, "img_size": 28}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 3],
    "num_classes": 7,
}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12], "num_classes": 7}
ATTENTIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "beit": ("beit_base_patch16_224", VIT, BY_HAND),
    "beit, no biases, SwiGLU": (
        "beit_base_patch16_224",
        {**VIT, "qkv_bias": False, "swiglu_mlp": True, "init_values": None},
        CALLED,
    ),
    "beit, shared positions": (
        "beit_base_patch16_224",
        {**VIT, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        UNITS,
    ),
    "eva": ("eva_giant_patch14_clip_224", EVA, BY_HAND),
    "eva-02, GluMlp": ("eva02_tiny_patch14_224", EVA, BY_HAND),
    "eva-02, q, k and v apart": (
        "eva02_base_patch14_224",
        {**EVA, "scale_mlp": False},
        CALLED,
    ),
    "eva-02, normalised units": ("eva02_base_patch14_224", EVA, CALLED[:-1]),
    "eva-02, normalised inside": (
        "eva02_base_patch16_clip_224",
        VIT,
        ("attn.input", "mlp.input"),
    ),
    "eva, post-norm": ("eva02_tiny_patch14_224", {**EVA, "use_post_norm": True}, BY_HAND),
    "dinov3": ("vit_small_patch16_dinov3", VIT, CALLED),
    "dinov3, biases": ("vit_small_patch16_dinov3_qkvb", VIT, BY_HAND),
    "rope": ("vit_small_patch16_rope_224", VIT, CALLED),
    "rope, mixed": (
        "vit_small_patch16_rope_mixed_224",
        VIT,
        ("attn.input", "mlp.input", "mlp.hidden"),
    ),
    "swin v2": ("swinv2_tiny_window8_256", SWIN, BY_HAND),
}
MLPS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "cait": ("cait_xxs24_224", VIT, UNITS),
    "xcit": ("xcit_nano_12_p16_224", VIT, UNITS),
    "convit": ("convit_tiny", {**VIT, "embed_dim": 8, "local_up_to_layer": 1}, UNITS),
    "pvt v2": (
        "pvt_v2_b0",
        {"embed_dims": [8, 16, 40, 64], "num_classes": 7},
        UNITS,
    ),
    "levit": (
        "levit_128s",
        {"img_size": 64, "embed_dim": [16, 24, 32], "key_dim": 8, "num_heads": [2, 3, 4]},
        UNITS,
    ),
    "mobilevit v2": ("mobilevitv2_050", {"num_classes": 7}, ("mlp.hidden",)),
    "convnext": ("convnext_atto", {**CONVNEXT, "conv_mlp": False}, UNITS),
    "convnext, convolutions": ("convnext_atto", {**CONVNEXT, "conv_mlp": True}, ("mlp.hidden",)),
    "pit": (
        "pit_ti_224",
        {"img_size": 64, "base_dims": [8, 8, 8], "depth": [1, 1, 1], "heads": [2, 4, 8]},
        UNITS,
    ),
}
NOT_COUNTED = ("rope, mixed", "convit") if Version(timm.__version__) < Version("1.0.31") else ()
FAMILIES = {
    family: case
    for family, case in (ATTENTIONS | MLPS).items()
    if timm.is_model(case[0]) and family not in NOT_COUNTED
}
