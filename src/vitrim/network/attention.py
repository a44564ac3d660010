"""Self-attention whose heads may differ in width, and a Linear that reads part of its input.

Legend: B batch, N tokens, D embed, Q all query (or key) dims, V all value dims, H heads of equal
widths in one run, K query-key width and W value width of such a head; of window attention, B is
the windows of a batch and L those of an image (1 where all have the same bias).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention
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
        self, dense: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.scale: float = dense.scale  # type: ignore[assignment]
        self.qk_dims = qk_dims
        self.v_dims = v_dims
        self.num_heads = len(v_dims)
        self.fused_attn: bool = dense.fused_attn  # type: ignore[assignment]
        take_over(self, dense)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); `attn_mask` and `is_causal` as in timm."""

        def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNW: Tensor, _: slice) -> Tensor:
            q_BHNK, k_BHNK = self.q_norm(q_BHNK), self.k_norm(k_BHNK)
            return attended(self, q_BHNK, k_BHNK, v_BHNW, attn_mask, is_causal=is_causal)

        out_BNV = self.norm(by_run(self.qkv(x), self.qk_dims, self.v_dims, attend))
        gate = getattr(self, "gate", None)
        if gate is not None:
            out_BNV = out_BNV * gate(x).sigmoid()
        out_BND: Tensor = self.proj_drop(self.proj(out_BNV))
        return out_BND

    def extra_repr(self) -> str:
        """Show the widths per head."""
        return f"qk_dims={self.qk_dims}, v_dims={self.v_dims}"


class SlicedWindowAttention(nn.Module):
    """timm's window attention after a cut; widths, scale and kernels are as in `SlicedAttention`.

    Of the relative position bias table, ((2h-1)(2w-1), heads) for windows of (h, w) tokens, the
    columns of removed heads are gone. A head without query-key dims attends by position alone.
    """

    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor
    qkv: nn.Module
    attn_drop: nn.Dropout
    softmax: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(
        self, dense: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.window_size: tuple[int, int] = dense.window_size  # type: ignore[assignment]
        self.window_area: int = dense.window_area  # type: ignore[assignment]
        self.scale: float = dense.scale  # type: ignore[assignment]
        self.fused_attn: bool = dense.fused_attn  # type: ignore[assignment]
        self.qk_dims = qk_dims
        self.v_dims = v_dims
        self.num_heads = len(v_dims)
        index = dense.get_buffer("relative_position_index")
        self.register_buffer("relative_position_index", index, persistent=False)
        take_over(self, dense)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows (B, N, D) to (B, N, D); `mask` (windows of an image, N, N) is added."""
        bias_HNN = self.relative_position_bias_table[self.relative_position_index].movedim(-1, 0)
        bias_LHNN = bias_HNN[None] if mask is None else bias_HNN + mask[:, None]

        def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNW: Tensor, heads: slice) -> Tensor:
            return self._attend(q_BHNK, k_BHNK, v_BHNW, bias_LHNN[:, heads])

        out_BNV = by_run(self.qkv(x), self.qk_dims, self.v_dims, attend)
        out_BND: Tensor = self.proj_drop(self.proj(out_BNV))
        return out_BND

    def _attend(self, q_BHNK: Tensor, k_BHNK: Tensor, v_BHNW: Tensor, bias_LHNN: Tensor) -> Tensor:
        """Return the output of one run of equal heads, shape (B, H, N, W)."""
        n_windows = bias_LHNN.shape[0]
        n_images = q_BHNK.shape[0] // n_windows  # len() would be a constant of a traced graph
        if self.fused_attn and q_BHNK.shape[-1] == v_BHNW.shape[-1]:
            return F.scaled_dot_product_attention(
                q_BHNK,
                k_BHNK,
                v_BHNW,
                attn_mask=bias_LHNN if n_windows == 1 else bias_LHNN.repeat(n_images, 1, 1, 1),
                dropout_p=self.attn_drop.p if self.training else 0.0,
                scale=self.scale,
            )
        attn_BHNN = _scores(q_BHNK * self.scale, k_BHNK)
        by_image = attn_BHNN.view(n_images, n_windows, *attn_BHNN.shape[1:])
        attn_BHNN = (by_image + bias_LHNN).flatten(0, 1)
        out_BHNW: Tensor = self.attn_drop(self.softmax(attn_BHNN)) @ v_BHNW
        return out_BHNW

    def extra_repr(self) -> str:
        """Show the widths per head."""
        return f"qk_dims={self.qk_dims}, v_dims={self.v_dims}"


def take_over(attn: nn.Module, dense: Any) -> None:
    """Give the sliced `attn` the modules and parameters of the attention that it replaces."""
    for name, parameter in dense.named_parameters(recurse=False):
        attn.register_parameter(name, parameter)
    for name, module in dense.named_children():
        attn.add_module(name, module)


def projected(attn: Any, x: Tensor) -> Tensor:
    """Return queries, keys and values of all heads side by side, (B, N, C).

    Of an attention with one layer for them, whose biases may be no part of it.
    """
    qkv_BNC: Tensor = attn.qkv(x)
    if getattr(attn, "q_bias", None) is None:
        return qkv_BNC
    return qkv_BNC + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])


def attended(
    attn: Any,
    q_BHNK: Tensor,
    k_BHNK: Tensor,
    v_BHNW: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
) -> Tensor:
    """Return the output of one run of equal heads of `attn`, shape (B, H, N, W)."""
    if attn.fused_attn and q_BHNK.shape[-1] == v_BHNW.shape[-1]:
        return F.scaled_dot_product_attention(
            q_BHNK,
            k_BHNK,
            v_BHNW,
            attn_mask=mask,
            dropout_p=attn.attn_drop.p if attn.training else 0.0,
            is_causal=is_causal,
            scale=attn.scale,
        )
    attn_BHNN = _scores(q_BHNK * attn.scale, k_BHNK)
    bias = _bias(attn_BHNN, mask, is_causal=is_causal)
    attn_BHNN = (attn_BHNN if bias is None else attn_BHNN + bias).softmax(dim=-1)
    out_BHNW: Tensor = attn.attn_drop(attn_BHNN) @ v_BHNW
    return out_BHNW


def _bias(attn_BHNN: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor | None:
    """Return what a mask adds to scores; as in the fused kernel, a causal run has no other mask."""
    if is_causal:
        return attn_BHNN.new_full(attn_BHNN.shape[-2:], -torch.inf).triu(1)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=attn_BHNN.dtype).masked_fill(~mask, -torch.inf)


@singledispatch
def sliced(attn: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]) -> nn.Module:
    """Return the attention whose sliced layers are those of `attn`, with these widths per head."""
    return SlicedAttention(attn, qk_dims=qk_dims, v_dims=v_dims)


@sliced.register(WindowAttention)
@sliced.register(SlicedWindowAttention)
def _(
    attn: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
) -> SlicedWindowAttention:
    return SlicedWindowAttention(attn, qk_dims=qk_dims, v_dims=v_dims)


def head_dims(attn: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the query-key and the value width of every head, each of shape (heads,)."""
    if getattr(attn, "v_dims", ()):
        return attn.qk_dims, attn.v_dims
    dim = attn.proj.in_features // attn.num_heads
    return (dim,) * attn.num_heads, (dim,) * attn.num_heads


def _scores(q_BHNK: Tensor, k_BHNK: Tensor) -> Tensor:
    """Return the products of queries and keys, (B, H, N, N).

    Without dims they are zeros: other programs' graphs know no empty tensors.
    """
    if not q_BHNK.shape[-1]:
        return q_BHNK.new_zeros(*q_BHNK.shape[:-1], k_BHNK.shape[-2])
    return q_BHNK @ k_BHNK.transpose(-2, -1)


def by_run(
    qkv_BNC: Tensor,
    qk_dims: Sequence[int],
    v_dims: Sequence[int],
    attend: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
) -> Tensor:
    """Return the outputs of all heads side by side, (B, N, V).

    `attend` maps q, k and v of neighbouring heads of equal widths, and which heads those are, to
    (B, H, N, W).
    """
    qk, v = sum(qk_dims), sum(v_dims)
    q_BNQ, k_BNQ, v_BNV = torch.split(qkv_BNC, [qk, qk, v], dim=-1)
    runs = []
    at = at_qk = at_v = 0
    for (k, w), group in groupby(zip(qk_dims, v_dims, strict=True)):
        h = len(list(group))
        out_BHNW = attend(
            _heads(q_BNQ, at_qk, h, k),
            _heads(k_BNQ, at_qk, h, k),
            _heads(v_BNV, at_v, h, w),
            slice(at, at + h),
        )
        runs.append(out_BHNW.transpose(1, 2).flatten(2))
        at, at_qk, at_v = at + h, at_qk + h * k, at_v + h * w
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=-1)


def _heads(x_BNC: Tensor, start: int, n_heads: int, head_dim: int) -> Tensor:
    """Return `n_heads` heads from column `start` on, shape (B, H, N, head_dim)."""
    run_BNC = x_BNC[..., start : start + n_heads * head_dim]
    return run_BNC.view(*x_BNC.shape[:2], n_heads, head_dim).transpose(1, 2)
