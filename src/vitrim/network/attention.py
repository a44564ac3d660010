"""Self-attention whose heads may differ in width, and a Linear that reads part of its input.

Legend: B batch, N tokens, D embed, Q all query (or key) dims, V all value dims, H heads of equal
widths in one run, K query-key width and W value width of such a head. In window attention, B is
the number of windows of a batch and L that of an image (1 where all have the same bias).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from itertools import groupby
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from vitrim.network.factored import widths_of_layer


class GatheredLinear(nn.Linear):
    """A Linear that reads only the columns `index` of a wider input.

    The residual stream keeps its width, so the layer itself selects its columns. The index follows
    from the plan and is not part of the state dict: saved tensors hold parameters only.
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
        # by rows: along the last of three dims, index_select is ten times slower on CPU
        rows = input.flatten(0, -2).index_select(1, self.index)
        narrow = rows.view(*input.shape[:-1], self.in_features)
        return F.linear(narrow, self.weight, self.bias)


class _SoftmaxAttention(Protocol):
    """What `attention_output` reads of an attention."""

    scale: float
    fused_attn: bool
    training: bool
    attn_drop: nn.Dropout


class _FusedProjection(Protocol):
    """What `project_qkv` reads of an attention: one layer, and biases that it may not contain."""

    qkv: nn.Module
    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None


@runtime_checkable
class Sliced(Protocol):
    """An attention that has been cut: the widths of its heads."""

    qk_dims: tuple[int, ...]
    v_dims: tuple[int, ...]


class SlicedAttention(nn.Module):
    """timm's self-attention after a cut: every head has its own query-key and value width.

    The modules and parameter names are those of the attention that it replaces. The softmax scale
    is the dense network's and is passed to the kernel, which would otherwise compute it from the
    new width. Neighbouring heads of equal widths run together. Equal query-key and value widths
    use the fused kernel; others use three plain operations, which on CPU are faster than the fused
    kernel's fallback. A head without query-key dims attends to every token equally.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
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
        take_over(self, dense, optional=("gate",))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); `attn_mask` and `is_causal` as in timm."""

        def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNW: Tensor, _: slice) -> Tensor:
            q_BHNK, k_BHNK = self.q_norm(q_BHNK), self.k_norm(k_BHNK)
            return attention_output(self, q_BHNK, k_BHNK, v_BHNW, attn_mask, is_causal=is_causal)

        out_BNV = self.norm(map_head_runs(self.qkv(x), self.qk_dims, self.v_dims, attend))
        if self.gate is not None:
            out_BNV = out_BNV * self.gate(x).sigmoid()
        out_BND: Tensor = self.proj_drop(self.proj(out_BNV))
        return out_BND

    def extra_repr(self) -> str:
        """Show the widths per head."""
        return f"qk_dims={self.qk_dims}, v_dims={self.v_dims}"


class SlicedWindowAttention(nn.Module):
    """timm's window attention after a cut; widths, scale and kernels are as in `SlicedAttention`.

    The relative position bias table, ((2h-1)(2w-1), heads) for windows of (h, w) tokens, has no
    columns for removed heads. A head without query-key dims attends by position only.
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

        out_BNV = map_head_runs(self.qkv(x), self.qk_dims, self.v_dims, attend)
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


def take_over(attn: nn.Module, dense: nn.Module, *, optional: Sequence[str] = ()) -> None:
    """Register the modules and parameters of the attention `dense` in the sliced `attn`.

    Modules named in `optional` that `dense` lacks are None.
    """
    for name, parameter in dense.named_parameters(recurse=False):
        attn.register_parameter(name, parameter)
    for name, module in dense.named_children():
        attn.add_module(name, module)
    for name in optional:
        if name not in dict(dense.named_children()):
            attn.register_module(name, None)


def project_qkv(attn: _FusedProjection, x: Tensor) -> Tensor:
    """Return queries, keys and values of all heads, concatenated: (B, N, C).

    The attention has one layer for them, and may keep its biases outside of the layer.
    """
    qkv_BNC: Tensor = attn.qkv(x)
    if attn.q_bias is None or attn.v_bias is None:
        return qkv_BNC
    return qkv_BNC + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])


def attention_output(
    attn: _SoftmaxAttention,
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
    """Return what a mask adds to scores; as in the fused kernel, a causal mask replaces others."""
    if is_causal:
        return attn_BHNN.new_full(attn_BHNN.shape[-2:], -torch.inf).triu(1)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=attn_BHNN.dtype).masked_fill(~mask, -torch.inf)


@singledispatch
def sliced(attn: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]) -> nn.Module:
    """Return an attention of the given widths per head with the (sliced) layers of `attn`."""
    return SlicedAttention(attn, qk_dims=qk_dims, v_dims=v_dims)


@sliced.register(WindowAttention)
@sliced.register(SlicedWindowAttention)
def _(
    attn: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
) -> SlicedWindowAttention:
    return SlicedWindowAttention(attn, qk_dims=qk_dims, v_dims=v_dims)


def head_dims(attn: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the query-key and the value width of every head, each of shape (heads,)."""
    if isinstance(attn, Sliced):
        return attn.qk_dims, attn.v_dims
    n_heads = int(attn.num_heads)  # type: ignore[arg-type]
    dim = widths_of_layer(attn.get_submodule("proj"))[0] // n_heads
    return (dim,) * n_heads, (dim,) * n_heads


def _scores(q_BHNK: Tensor, k_BHNK: Tensor) -> Tensor:
    """Return the products of queries and keys, (B, H, N, N).

    Without dims they are zeros: exported graphs cannot contain empty tensors.
    """
    if not q_BHNK.shape[-1]:
        return q_BHNK.new_zeros(*q_BHNK.shape[:-1], k_BHNK.shape[-2])
    return q_BHNK @ k_BHNK.transpose(-2, -1)


def map_head_runs(
    qkv_BNC: Tensor,
    qk_dims: Sequence[int],
    v_dims: Sequence[int],
    attend: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
) -> Tensor:
    """Return the outputs of all heads, concatenated: (B, N, V).

    `attend` maps q, k and v of a run of neighbouring heads of equal widths, and the slice of those
    heads, to (B, H, N, W).
    """
    qk, v = sum(qk_dims), sum(v_dims)
    q_BNQ, k_BNQ, v_BNV = torch.split(qkv_BNC, [qk, qk, v], dim=-1)
    outputs = []
    head = qk_column = v_column = 0
    for (k, w), group in groupby(zip(qk_dims, v_dims, strict=True)):
        h = len(list(group))
        out_BHNW = attend(
            _heads(q_BNQ, qk_column, h, k),
            _heads(k_BNQ, qk_column, h, k),
            _heads(v_BNV, v_column, h, w),
            slice(head, head + h),
        )
        outputs.append(out_BHNW.transpose(1, 2).flatten(2))
        head, qk_column, v_column = head + h, qk_column + h * k, v_column + h * w
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _heads(x_BNC: Tensor, start: int, n_heads: int, head_dim: int) -> Tensor:
    """Return `n_heads` heads from column `start`, shape (B, H, N, head_dim)."""
    run_BNC = x_BNC[..., start : start + n_heads * head_dim]
    return run_BNC.view(*x_BNC.shape[:2], n_heads, head_dim).transpose(1, 2)
