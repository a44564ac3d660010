"""The EVA family of timm: EVA, EVA-02, DINOv3 and the ViTs with rotary positions, all `Eva`.

Queries and keys are rotated dim by dim, so their dims are locked (`vitrim.network.heads`). Heads,
value dims and MLP units (`vitrim.network.mlp`) can be cut unless a norm reads them. Annotations
are evaluated here, because TorchScript reads no strings.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from vitrim.network.attention import sliced, take_over, with_biases
from vitrim.network.dispatch import UnsupportedArchitecture, fix_input_size, stream, structure
from vitrim.network.head_runs import SlicedHeads, heads_from
from vitrim.network.heads import attention_of, steps_of
from vitrim.network.mlp import mlp_of
from vitrim.network.stream import Stream
from vitrim.network.structure import Structure, joined


class SlicedEvaAttention(SlicedHeads, nn.Module):
    """timm's rotary attention after a cut: every head has its own value width."""

    if TYPE_CHECKING:  # TorchScript cannot read annotations of modules
        qkv: nn.Module | None
        q_proj: nn.Module
        k_proj: nn.Module
        v_proj: nn.Module
        q_norm: nn.Module
        k_norm: nn.Module
        attn_drop: nn.Dropout
        norm: nn.Module
        gate: nn.Module | None
        proj: nn.Module
        proj_drop: nn.Module

    def __init__(
        self, dense: EvaAttention, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.scale: float = dense.scale
        self.set_widths(qk_dims, v_dims)
        self.num_prefix_tokens: int = dense.num_prefix_tokens
        self.rotate_half: bool = getattr(dense, "rotate_half", False)  # since timm 1.0.20
        self.fused_attn: bool = dense.fused_attn
        biases = dict(dense.named_parameters(recurse=False))
        self.q_bias, self.v_bias = biases.get("q_bias"), biases.get("v_bias")
        take_over(self, dense, optional=("qkv", "q_proj", "k_proj", "v_proj", "gate"))

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); the other arguments as in timm."""
        if self.qkv is not None:
            qkv_BNC = with_biases(self.qkv(x), self.q_bias, self.v_bias)
        else:
            qkv_BNC = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        q_BNQ, k_BNQ, v_BNV = torch.split(self.spread(qkv_BNC), self.qkv_sizes, dim=-1)
        outputs = []
        for _, h, qk, k, v, w in self.head_runs:
            v_BHNW = heads_from(v_BNV, v, h, w)
            q_BHNK = self._rotated(self.q_norm(heads_from(q_BNQ, qk, h, k)), rope).type_as(v_BHNW)
            k_BHNK = self._rotated(self.k_norm(heads_from(k_BNQ, qk, h, k)), rope).type_as(v_BHNW)
            out_BHNW = self.attended(q_BHNK, k_BHNK, v_BHNW, attn_mask, is_causal, k, w)
            outputs.append(out_BHNW.transpose(1, 2).flatten(2))
        out_BNV = self.norm(self.gathered(outputs))
        if self.gate is not None:
            out_BNV = out_BNV * self.gate(x).sigmoid()
        out_BND: Tensor = self.proj_drop(self.proj(out_BNV))
        return out_BND

    def _rotated(self, x_BHNK: Tensor, rope: Tensor | None) -> Tensor:
        """Apply the rotary embedding to all tokens except the prefix tokens."""
        if rope is None:
            return x_BHNK
        prefix = x_BHNK[:, :, : self.num_prefix_tokens]
        patches = x_BHNK[:, :, self.num_prefix_tokens :]
        if self.rotate_half:
            rotated = apply_rot_embed_cat(patches, rope, half=True)
        else:
            rotated = apply_rot_embed_cat(patches, rope)
        return torch.cat([prefix, rotated], dim=2)


_ATTENTIONS = (EvaAttention, AttentionRope, SlicedEvaAttention)


@sliced.register(EvaAttention)
@sliced.register(AttentionRope)
@sliced.register(SlicedEvaAttention)
def _(attn: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]) -> SlicedEvaAttention:
    return SlicedEvaAttention(attn, qk_dims=qk_dims, v_dims=v_dims)


@structure.register
def _(net: Eva) -> Structure:
    parts = []
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
        parts += [
            attention_of(
                f"{name}.attn",
                block.attn,
                qk_locked="query-key dims are rotated together, or normalised",
                v_locked=_locked_reason(net, block.attn),
            ),
            mlp_of(f"{name}.mlp", block.mlp),
        ]
    return joined(parts)


@fix_input_size.register
def _(net: Eva, size: tuple[int, int]) -> None:
    if net.dynamic_img_size:
        net.set_input_size(img_size=size)


@stream.register
def _(net: Eva) -> Stream:
    if any(type(block) is EvaBlockPostNorm for block in net.blocks):
        raise UnsupportedArchitecture(
            f"{type(net).__name__} with EvaBlockPostNorm has no residual stream to regress on: its "
            "branches end in norms; supported here: EvaBlock; choose a method or option that needs "
            "no stream"
        )
    ropes = _ropes(net)

    def embed(images: Tensor) -> Tensor:
        x_BND, rope = net._pos_embed(net.patch_embed(images))
        if rope is not None:  # that of these images, where the network takes any size
            ropes[:] = list(rope) if net.rope_mixed else [rope] * len(ropes)
        embedded: Tensor = net.norm_pre(x_BND)
        return embedded

    return Stream(
        embed=embed,
        steps=tuple(
            step
            for index, block in enumerate(net.blocks)
            for step in steps_of(f"blocks.{index}", block, rope=partial(ropes.__getitem__, index))
        ),
        final_norm="norm",
        n_prefix_tokens=net.num_prefix_tokens,
        n_readout_tokens=int(net.global_pool == "token"),
        norm_is_features=True,
    )


def _ropes(net: Eva) -> list[Tensor | None]:
    """Return the rotary embedding of every block, for the size that the network was built for."""
    if net.rope is None:
        return [None] * len(net.blocks)
    rope = net.rope.get_embed(net.patch_embed.grid_size)
    return list(rope) if net.rope_mixed else [rope] * len(net.blocks)


def _locked_reason(net: Eva, attn: EvaAttention) -> str:
    if not isinstance(attn.norm, nn.Identity):
        return "the attention output is normalised"
    return "every head has its own rotations" if net.rope_mixed else ""
