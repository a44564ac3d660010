"""Swin transformer v2 of timm: `SwinTransformerV2`, with scaled cosine attention.

Queries and keys are normalised over a head, so their dims are locked (`vitrim.network.heads`). The
last layer of the small MLP that makes the position biases has one row per head. The sites of MLPs
are described in `vitrim.network.mlp`; windows are those of `vitrim.network.family.swin`.
Annotations are evaluated here, because TorchScript reads no strings.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import (
    SwinTransformerV2,
    SwinTransformerV2Block,
    WindowAttention,
)
from torch import Tensor, nn

from vitrim.network.attention import sliced, take_over, with_biases
from vitrim.network.dispatch import UnsupportedArchitecture, structure
from vitrim.network.factored import widths_of_layer
from vitrim.network.head_runs import SlicedHeads, heads_from
from vitrim.network.heads import attention_of
from vitrim.network.mlp import mlp_of
from vitrim.network.structure import Layer, Part, Structure, full, joined


class SlicedCosineAttention(SlicedHeads, WindowAttention):  # type: ignore[misc]
    """timm's cosine attention after a cut: every head has its own value width."""

    def __init__(
        self, dense: WindowAttention, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
    ) -> None:
        nn.Module.__init__(self)
        self.set_widths(qk_dims, v_dims)
        self.max_logit_scale = math.log(100)  # as in timm
        self.window_size = dense.window_size
        self.pretrained_window_size = dense.pretrained_window_size
        self.q_bias, self.k_bias, self.v_bias = dense.q_bias, None, dense.v_bias
        for name in ("relative_coords_table", "relative_position_index"):
            self.register_buffer(name, dense.get_buffer(name), persistent=False)
        take_over(self, dense)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows (B, N, D) to (B, N, D); `mask` (windows of an image, N, N) is added."""
        scale_H11 = self.logit_scale.clamp(max=self.max_logit_scale).exp()
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        bias_HNN = 16 * table[self.relative_position_index].movedim(-1, 0).sigmoid()
        qkv_BNC = with_biases(self.qkv(x), self.q_bias, self.v_bias)
        q_BNQ, k_BNQ, v_BNV = torch.split(self.spread(qkv_BNC), self.qkv_sizes, dim=-1)
        outputs = []
        for first, h, qk, k, v, w in self.head_runs:
            q_BHNK = F.normalize(heads_from(q_BNQ, qk, h, k), dim=-1)
            k_BHNK = F.normalize(heads_from(k_BNQ, qk, h, k), dim=-1)
            attn_BHNN = q_BHNK @ k_BHNK.transpose(-2, -1) * scale_H11[first : first + h]
            attn_BHNN = attn_BHNN + bias_HNN[first : first + h]
            if mask is not None:
                by_image = attn_BHNN.unflatten(0, [-1, mask.shape[0]]) + mask[:, None]
                attn_BHNN = by_image.flatten(0, 1)
            out_BHNW = self.attn_drop(self.softmax(attn_BHNN)) @ heads_from(v_BNV, v, h, w)
            outputs.append(out_BHNW.transpose(1, 2).flatten(2))
        out_BND: Tensor = self.proj_drop(self.proj(self.gathered(outputs)))
        return out_BND


@sliced.register(WindowAttention)
def _(
    attn: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
) -> SlicedCosineAttention:
    return SlicedCosineAttention(attn, qk_dims=qk_dims, v_dims=v_dims)


@structure.register
def _(net: SwinTransformerV2) -> Structure:
    parts = []
    for stage, layer in enumerate(net.layers):
        for index, block in enumerate(layer.blocks):
            name = f"layers.{stage}.blocks.{index}"
            if type(block) is not SwinTransformerV2Block:
                raise UnsupportedArchitecture(
                    f"{type(net).__name__} with {type(block).__name__} cannot be cut; "
                    "supported: SwinTransformerV2Block"
                )
            parts += [
                _attention(f"{name}.attn", block.attn),
                mlp_of(f"{name}.mlp", block.mlp),
            ]
    return joined(parts)


def _attention(name: str, attn: WindowAttention) -> Structure:
    described = attention_of(
        name,
        attn,
        qk_locked="q and k are normalised over the head",
        per_head={"logit_scale": 0},
        context=attn.window_size[0] * attn.window_size[1],
    )
    biases = Layer(
        name=f"{name}.cpb_mlp.2",
        branch=name,
        out=(Part(site=f"{name}.heads", offset=0, size=attn.num_heads),),
        inp=full(widths_of_layer(attn.cpb_mlp[2])[0]),
        locked_reason="it makes the position biases, one row per head",
    )
    return replace(described, layers=(*described.layers, biases))
