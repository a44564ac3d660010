"""`vit_norm_eps`: timm's ViT with the epsilon of its norms as an argument.

timm takes the epsilon as part of a norm's class, which a plan cannot state. transformers' ViT and
DeiT have 1e-12 where timm's have 1e-6. The network itself is timm's VisionTransformer.
"""

from __future__ import annotations

from functools import partial

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        "vit_norm_eps": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def vit_norm_eps(
    pretrained: bool = False,
    *,
    norm_eps: float = 1e-6,
    distilled: bool = False,
    **kwargs: object,
) -> VisionTransformer:
    """A ViT whose norms add `norm_eps` to the variance; by default its sizes are ViT-B/16's.

    `distilled` is DeiT's network with a second classifier, which reads a distillation token.
    Further arguments are those of timm's VisionTransformer.
    """
    return build_model_with_cfg(
        VisionTransformerDistilled if distilled else VisionTransformer,
        "vit_norm_eps",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        **kwargs,
    )
