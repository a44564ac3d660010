"""The EVA family of timm: EVA, EVA-02, DINOv3 and the ViTs with rotary positions, all `Eva`.

Queries and keys are rotated dim by dim, so that their dims stay (`vitrim.network.heads`); heads and
value dims go, and MLP units (`vitrim.network.mlp`), unless a norm reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from vitrim.network.attention import attended, by_run, projected, sliced, take_over
from vitrim.network.dispatch import UnsupportedArchitecture, stream, structure
from vitrim.network.heads import attention_of, steps_of
from vitrim.network.mlp import mlp_of
from vitrim.network.stream import Stream
from vitrim.network.structure import Structure, joined


class SlicedEvaAttention(nn.Module):
    """timm's rotary attention after a cut: every head has its own value width."""

    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, dense: Any, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.scale: float = dense.scale
        self.num_heads = len(v_dims)
        self.qk_dims = qk_dims
        self.v_dims = v_dims
        self.num_prefix_tokens: int = dense.num_prefix_tokens
        self.rotate_half: bool = getattr(dense, "rotate_half", False)  # timm from 1.0.20 on
        self.fused_attn: bool = dense.fused_attn
        take_over(self, dense)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); the other arguments as in timm."""

        def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNW: Tensor, _: slice) -> Tensor:
            q_BHNK = self._rotated(self.q_norm(q_BHNK), rope).type_as(v_BHNW)
            k_BHNK = self._rotated(self.k_norm(k_BHNK), rope).type_as(v_BHNW)
            return attended(self, q_BHNK, k_BHNK, v_BHNW, attn_mask, is_causal=is_causal)

        out_BNV = self.norm(by_run(self._projected(x), self.qk_dims, self.v_dims, attend))
        gate = getattr(self, "gate", None)
        if gate is not None:
            out_BNV = out_BNV * gate(x).sigmoid()
        out_BND: Tensor = self.proj_drop(self.proj(out_BNV))
        return out_BND

    def _projected(self, x: Tensor) -> Tensor:
        """Return queries, keys and values of all heads side by side, (B, N, C)."""
        parts = dict(self.named_children())
        if "qkv" not in parts:
            return torch.cat([parts[name](x) for name in ("q_proj", "k_proj", "v_proj")], dim=-1)
        return projected(self, x)

    def _rotated(self, x_BHNK: Tensor, rope: Tensor | None) -> Tensor:
        """Turn all but the prefix tokens by their positions."""
        if rope is None:
            return x_BHNK
        prefix, patches = x_BHNK.tensor_split([self.num_prefix_tokens], dim=2)
        how = {"half": True} if self.rotate_half else {}
        turned = apply_rot_embed_cat(patches, rope, **how)
        return torch.cat([prefix, turned], dim=2)

    def extra_repr(self) -> str:
        """Show the widths per head."""
        return f"qk_dims={self.qk_dims}, v_dims={self.v_dims}"


_ATTENTIONS = (EvaAttention, AttentionRope, SlicedEvaAttention)


@sliced.register(EvaAttention)
@sliced.register(AttentionRope)
@sliced.register(SlicedEvaAttention)
def _(attn: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]) -> SlicedEvaAttention:
    return SlicedEvaAttention(attn, qk_dims=qk_dims, v_dims=v_dims)


@structure.register
def _(net: Eva) -> Structure:
    found = []
    for index, block in enumerate(net.blocks):
        name = f"blocks.{index}"
        shared = getattr(block.attn, "num_kv_groups", 1) > 1
        known = type(block) in (EvaBlock, EvaBlockPostNorm) and type(block.attn) in _ATTENTIONS
        if not known or shared:
            raise UnsupportedArchitecture(
                f"{type(net).__name__} with {type(block).__name__} and "
                f"{type(getattr(block, 'attn', None)).__name__}"
                f"{' of shared keys and values' if shared else ''} cannot be cut; "
                "supported: EvaBlock and EvaBlockPostNorm with EvaAttention or AttentionRope"
            )
        found += [
            attention_of(
                f"{name}.attn",
                block.attn,
                fixed="query-key dims are rotated together, or normalised",
                scaled=_lock(net, block.attn),
            ),
            mlp_of(f"{name}.mlp", block.mlp),
        ]
    return joined(found)


@stream.register
def _(net: Eva) -> Stream:
    if any(type(block) is EvaBlockPostNorm for block in net.blocks):
        raise UnsupportedArchitecture(
            f"{type(net).__name__} with EvaBlockPostNorm: its branches end in norms, which nothing "
            "can be regressed through; supported here: EvaBlock, or a method without images"
        )
    ropes = _ropes(net)
    return Stream(
        embed=lambda images: net.norm_pre(net._pos_embed(net.patch_embed(images))[0]),
        steps=tuple(
            step
            for index, (block, rope) in enumerate(zip(net.blocks, ropes, strict=True))
            for step in steps_of(f"blocks.{index}", block, rope=rope)
        ),
        after="norm",
        prefix=net.num_prefix_tokens,
        readout=int(net.global_pool == "token"),
        alone=True,
    )


def _ropes(net: Any) -> list[Tensor | None]:
    """Return the rotations of every block, for images of the size the network was made for."""
    if net.rope is None:
        return [None] * len(net.blocks)
    rope = net.rope.get_embed(net.patch_embed.grid_size)
    return list(rope) if net.rope_mixed else [rope] * len(net.blocks)


def _lock(net: Any, attn: Any) -> str:
    if not isinstance(attn.norm, nn.Identity):
        return "the attention output is normalised"
    return "every head has rotations of its own" if net.rope_mixed else ""
