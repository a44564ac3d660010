"""DINOv2-S with the four-layer linear head of its hub, `dinov2_vits14_lc`, on timm's blocks.

`dinov2_linear` has the head on the last block only, as transformers' Dinov2ForImageClassification.

The head reads the normed class tokens of the last four blocks and the mean of the last block's
normed patch tokens (arXiv 2304.07193, section 7). Parameter names are the hub's, so that the state
dict of `torch.hub.load("facebookresearch/dinov2", "dinov2_vits14_lc")` loads unchanged. Position
embeddings are stored for 518 pixels and resampled by timm to the size of the images.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitrim.network.dispatch import drop_branch, fix_input_size, stream, structure
from vitrim.network.stream import Stream
from vitrim.network.structure import Structure, prefixed

LAYERS = 4
HUB = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14"
_BACKBONE = {
    "patch_size": 14,
    "img_size": 518,
    "embed_dim": 384,
    "depth": 12,
    "num_heads": 6,
    "init_values": 1e-5,
    "num_classes": 0,
    "dynamic_img_size": True,
}

_CONFIG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 644, 644),
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "fixed_input_size": False,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "backbone.patch_embed.proj",
    "classifier": "linear_head",
}
default_cfgs = generate_default_cfgs({"dinov2_vits14_lc": _CONFIG, "dinov2_linear": _CONFIG})


class LinearClassifier(nn.Module):
    """A DINOv2 backbone and a linear classifier on its last blocks, `layers` of them.

    23,977,576 parameters as `dinov2_vits14_lc`, the unused mask token included.
    """

    def __init__(
        self, backbone: VisionTransformer, *, num_classes: int, layers: int = LAYERS
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.layers = layers
        self.linear_head = nn.Linear((layers + 1) * backbone.embed_dim, num_classes)

    @property
    def patch_embed(self) -> nn.Module:
        """The backbone's patch embedding, under the name it has in timm's networks."""
        patch_embed: nn.Module = self.backbone.patch_embed
        return patch_embed

    def get_classifier(self) -> nn.Module:
        """Return the classifier; part of timm's interface."""
        return self.linear_head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a random one; part of timm's interface."""
        self.num_classes = num_classes
        old = self.linear_head
        self.linear_head = nn.Linear(
            old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the inputs of the head, (B, (layers + 1) * D)."""
        tokens = self.backbone.patch_embed(x)
        return self._read(*self._blocks(self.backbone.norm_pre(self.backbone._pos_embed(tokens))))

    def _blocks(self, x_BND: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the class tokens after each of the last blocks, and the last block's tokens."""
        classes = []
        for block in self.backbone.blocks:
            x_BND = block(x_BND)
            classes.append(x_BND[:, 0])
        return classes[-self.layers :], x_BND

    def _read(self, classes: list[Tensor], x_BND: Tensor) -> Tensor:
        norm = self.backbone.norm
        # before the class tokens: `stream` names the norm's first call
        patches = norm(x_BND)[:, self.backbone.num_prefix_tokens :].mean(1)
        return torch.cat([*(norm(token) for token in classes), patches], dim=-1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Map what `forward_features` returns to logits (B, classes)."""
        return features if pre_logits else self.linear_head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W), sides divisible by 14, to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


@structure.register
def _(net: LinearClassifier) -> Structure:
    return prefixed(structure(net.backbone), "backbone.")


@drop_branch.register
def _(net: LinearClassifier, branch: str) -> None:
    drop_branch(net.backbone, branch.removeprefix("backbone."))


@fix_input_size.register
def _(net: LinearClassifier, size: tuple[int, int]) -> None:
    fix_input_size(net.backbone, size)


@stream.register
def _(net: LinearClassifier) -> Stream:
    inner = stream(net.backbone)
    steps = tuple(
        replace(branch, name=f"backbone.{branch.name}", reader=f"backbone.{branch.reader}")
        for branch in inner.branches
    )
    return replace(
        inner,
        steps=steps,
        final_norm=f"backbone.{inner.final_norm}",
        n_readout_tokens=1,
        norm_is_features=False,
    )


def _hub_weights(cache_dir: str | None) -> dict[str, Tensor]:
    """Download the hub's weights of backbone and head; return them by this network's names."""
    backbone, head = (
        torch.hub.load_state_dict_from_url(
            f"{HUB}/dinov2_vits14_{part}.pth", cache_dir, map_location="cpu", weights_only=True
        )
        for part in ("pretrain", "linear4_head")
    )
    return {f"backbone.{name}": tensor for name, tensor in backbone.items()} | {
        f"linear_head.{name}": tensor for name, tensor in head.items()
    }


@register_model  # type: ignore[untyped-decorator]
def dinov2_vits14_lc(
    pretrained: bool = False,
    *,
    num_classes: int = 1000,
    img_size: int | None = None,
    pretrained_cfg: PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, object] | None = None,
    cache_dir: str | None = None,
    **kwargs: object,
) -> LinearClassifier:
    """DINOv2 ViT-S/14 with the hub's four-layer linear head; `pretrained` downloads its weights.

    `img_size` is ignored: any multiple of 14 pixels works, position embeddings are stored for 518.
    """
    settings = {**_BACKBONE, **kwargs}
    backbone = VisionTransformer(**settings)
    mask_token = torch.zeros(1, backbone.embed_dim)
    backbone.register_parameter("mask_token", nn.Parameter(mask_token))
    net = LinearClassifier(backbone, num_classes=num_classes)
    if pretrained:
        net.load_state_dict(_hub_weights(cache_dir))
    net.pretrained_cfg = (pretrained_cfg or get_pretrained_cfg("dinov2_vits14_lc")).to_dict()
    return net


@register_model  # type: ignore[untyped-decorator]
def dinov2_linear(pretrained: bool = False, **kwargs: object) -> LinearClassifier:
    """A DINOv2 backbone with a linear head on the class token and the mean of the patch tokens.

    Arguments are those of timm's VisionTransformer; by default it is DINOv2-S/14.
    """
    net: LinearClassifier = build_model_with_cfg(
        _of_last_block, "dinov2_linear", pretrained, **kwargs
    )
    return net


def _of_last_block(*, num_classes: int = 1000, **kwargs: object) -> LinearClassifier:
    backbone = VisionTransformer(**{**_BACKBONE, **kwargs, "num_classes": 0})
    return LinearClassifier(backbone, num_classes=num_classes, layers=1)
