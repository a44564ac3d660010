"""Self-attention whose heads may differ in width, and a Linear that reads part of its input.

Legend: B batch, N tokens, D embed, Q all query (or key) dims, V all value dims, H heads of equal
widths in one run, K query-key width and W value width of such a head.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from timm.layers import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn


class GatheredLinear(nn.Linear):
    """A Linear that reads only the columns `index` of a wider input.

    The residual stream keeps its width, so the gather stands at the layer's door. The index is
    derived from the plan and not part of the state dict: saved tensors hold parameters only.
    """

    index: Tensor

    def __init__(self, *, weight: nn.Parameter, bias: nn.Parameter | None, index: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)
        self.register_buffer("index", index, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., wide) to (..., out_features)."""
        # as rows: along the last of three dims, index_select is ten times as slow on CPU
        rows = input.flatten(0, -2).index_select(1, self.index)
        narrow = rows.view(*input.shape[:-1], self.in_features)
        return F.linear(narrow, self.weight, self.bias)


class SlicedAttention(nn.Module):
    """timm's self-attention after a cut: every head has its own query-key and value width.

    Takes over the modules and parameter names of the attention it replaces. The softmax scale
    stays the dense network's: it is passed to the kernel, which would otherwise take it from the
    new width. Neighbouring heads of equal widths run together; equal query-key and value widths
    take the fused kernel, others three plain operations, which on CPU are faster than the fused
    kernel's fallback. A head without query-key dims attends to every token equally.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(
        self, dense: nn.Module, *, scale: float, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.scale = scale
        self.qk_dims = qk_dims
        self.v_dims = v_dims
        self.num_heads = len(v_dims)
        self.fused_attn: bool = dense.fused_attn  # type: ignore[assignment]
        for name, module in dense.named_children():
            self.add_module(name, module)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); `attn_mask` and `is_causal` as in timm."""
        qk, v = sum(self.qk_dims), sum(self.v_dims)
        q_BNQ, k_BNQ, v_BNV = self.qkv(x).split((qk, qk, v), dim=-1)
        runs = []
        at_qk = at_v = 0
        for (k, w), group in groupby(zip(self.qk_dims, self.v_dims, strict=True)):
            h = len(list(group))
            runs.append(
                self._attend(
                    self.q_norm(_heads(q_BNQ, at_qk, h, k)),
                    self.k_norm(_heads(k_BNQ, at_qk, h, k)),
                    _heads(v_BNV, at_v, h, w),
                    attn_mask,
                    is_causal,
                )
            )
            at_qk, at_v = at_qk + h * k, at_v + h * w
        out_BNV = runs[0] if len(runs) == 1 else torch.cat(runs, dim=-1)
        out_BNV = self.norm(out_BNV)
        gate = getattr(self, "gate", None)
        if gate is not None:
            out_BNV = out_BNV * gate(x).sigmoid()
        out_BND: Tensor = self.proj_drop(self.proj(out_BNV))
        return out_BND

    def _attend(
        self, q_BHNK: Tensor, k_BHNK: Tensor, v_BHNW: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Return the output of one run of equal heads, shape (B, N, H*W)."""
        if self.fused_attn and q_BHNK.shape[-1] == v_BHNW.shape[-1]:
            out_BHNW = F.scaled_dot_product_attention(
                q_BHNK,
                k_BHNK,
                v_BHNW,
                attn_mask=mask,
                dropout_p=self.attn_drop.p if self.training else 0.0,
                is_causal=is_causal,
                scale=self.scale,
            )
        else:
            attn_BHNN = (q_BHNK * self.scale) @ k_BHNK.transpose(-2, -1)
            bias = resolve_self_attn_mask(q_BHNK.shape[-2], attn_BHNN, mask, is_causal)
            attn_BHNN = maybe_add_mask(attn_BHNN, bias).softmax(dim=-1)
            out_BHNW = self.attn_drop(attn_BHNN) @ v_BHNW
        return out_BHNW.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Show the widths per head."""
        return f"qk_dims={self.qk_dims}, v_dims={self.v_dims}"


def _heads(x_BNC: Tensor, start: int, n_heads: int, head_dim: int) -> Tensor:
    """Return `n_heads` heads from column `start` on, shape (B, H, N, head_dim)."""
    run_BNC = x_BNC[..., start : start + n_heads * head_dim]
    return run_BNC.view(*x_BNC.shape[:2], n_heads, head_dim).transpose(1, 2)
