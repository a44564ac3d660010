"""Self-attention whose heads may differ in width, and a Linear that reads part of its input.

The modules can be compiled by torch.jit.script and traced by torch.fx: their forward passes call
functions of tensors and numbers, and annotations are evaluated (TorchScript reads no strings).

Legend: B batch, N tokens, D embed, Q all query (or key) dims, V all value dims, H heads of equal
widths in one run, K query-key width and W value width of such a head. In window attention, B is
the number of windows of a batch and L that of an image (1 where all have the same bias).
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from vitrim.network.attention_maps import window_bias, window_map
from vitrim.network.factored import widths_of_layer
from vitrim.network.head_runs import SlicedHeads, heads_from


class GatheredLinear(nn.Module):
    """A Linear behind a gather: `linear` reads the columns `index` of a wider input.

    The residual stream keeps its width, so the layer itself selects its columns. `in_features` is
    the width of the stream, that of `linear` is the number of selected columns. The index follows
    from the plan and is not part of the state dict, in which the parameters have the names that
    they have in a plain Linear.
    """

    if TYPE_CHECKING:
        index: Tensor

    __jit_unused_properties__ = ("weight", "bias")

    def __init__(
        self,
        *,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        index: Tensor,
        in_features: int,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = weight.shape[0]
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.linear.weight = weight
        self.linear.bias = bias  # type: ignore[assignment]
        self.register_buffer("index", index, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight of `linear`, (out_features, selected columns)."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of `linear`."""
        return self.linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        # by rows: along the last of three dims, index_select is ten times slower on CPU
        rows = input.flatten(0, -2).index_select(1, self.index)
        output: Tensor = self.linear(torch.unflatten(rows, 0, input.shape[:-1]))
        return output

    def state_dict(  # type: ignore[override]
        self, *args: Any, prefix: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Return the state dict, the tensors of `linear` under the names of a plain Linear.

        What other libraries put into `linear`, such as adapters, keeps its own names.
        """
        state: dict[str, Any] = super().state_dict(*args, prefix=prefix, **kwargs)
        inner = f"{prefix}linear."
        for key in [key for key in state if key.startswith(inner)]:
            if "." not in (name := key.removeprefix(inner)):
                state[prefix + name] = state.pop(key)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if "." not in (name := key.removeprefix(prefix)):
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Show the width of the input."""
        return f"in_features={self.in_features}"


def own_name(net: nn.Module, name: str) -> str:
    """Return the name in `net.named_parameters()` of the parameter `net.get_parameter(name)`."""
    path, _, last = name.rpartition(".")
    gathers = isinstance(net.get_submodule(path), GatheredLinear)
    return f"{path}.linear.{last}" if gathers else name


def parameters_of(layer: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the parameters of a layer by the names that they have in the state dict."""
    return dict((layer.linear if isinstance(layer, GatheredLinear) else layer).named_parameters())


@runtime_checkable
class Sliced(Protocol):
    """An attention that has been cut: the widths of its heads."""

    qk_dims: tuple[int, ...]
    v_dims: tuple[int, ...]


class SlicedAttention(SlicedHeads, nn.Module):
    """timm's self-attention after a cut: every head has its own query-key and value width.

    The modules and parameter names are those of the attention that it replaces. Neighbouring heads
    of equal widths run together (`vitrim.network.head_runs` has other arrangements). Equal
    query-key and value widths use the fused kernel; others use three plain operations, which on CPU
    are faster than the fused kernel's fallback. A head without query-key dims attends to every
    token equally.
    """

    if TYPE_CHECKING:  # TorchScript cannot read annotations of modules
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
        self.set_widths(qk_dims, v_dims)
        self.fused_attn: bool = dense.fused_attn  # type: ignore[assignment]
        take_over(self, dense, optional=("gate",))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); `attn_mask` and `is_causal` as in timm."""
        q_BNQ, k_BNQ, v_BNV = torch.split(self.spread(self.qkv(x)), self.qkv_sizes, dim=-1)
        outputs = []
        for _, h, qk, k, v, w in self.head_runs:
            q_BHNK = self.q_norm(heads_from(q_BNQ, qk, h, k))
            k_BHNK = self.k_norm(heads_from(k_BNQ, qk, h, k))
            v_BHNW = heads_from(v_BNV, v, h, w)
            out_BHNW = self.attended(q_BHNK, k_BHNK, v_BHNW, attn_mask, is_causal, k, w)
            outputs.append(out_BHNW.transpose(1, 2).flatten(2))
        out_BNV = self.norm(self.gathered(outputs))
        if self.gate is not None:
            out_BNV = out_BNV * self.gate(x).sigmoid()
        out_BND: Tensor = self.proj_drop(self.proj(out_BNV))
        return out_BND


class SlicedWindowAttention(SlicedHeads, WindowAttention):  # type: ignore[misc]
    """timm's window attention after a cut; widths, scale and kernels are as in `SlicedAttention`.

    The relative position bias table, ((2h-1)(2w-1), heads) for windows of (h, w) tokens, has no
    columns for removed heads. A head without query-key dims attends by position only.
    """

    def __init__(
        self, dense: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
    ) -> None:
        nn.Module.__init__(self)
        self.window_size: tuple[int, int] = dense.window_size  # type: ignore[assignment]
        self.window_area: int = dense.window_area  # type: ignore[assignment]
        self.scale: float = dense.scale  # type: ignore[assignment]
        self.fused_attn: bool = dense.fused_attn  # type: ignore[assignment]
        self.set_widths(qk_dims, v_dims)
        index = dense.get_buffer("relative_position_index")
        self.register_buffer("relative_position_index", index, persistent=False)
        take_over(self, dense)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows (B, N, D) to (B, N, D); `mask` (windows of an image, N, N) is added."""
        bias_HNN = self.relative_position_bias_table[self.relative_position_index].movedim(-1, 0)
        q_BNQ, k_BNQ, v_BNV = torch.split(self.spread(self.qkv(x)), self.qkv_sizes, dim=-1)
        outputs = []
        for first, h, qk, k, v, w in self.head_runs:
            q_BHNK = heads_from(q_BNQ, qk, h, k)
            k_BHNK = heads_from(k_BNQ, qk, h, k)
            v_BHNW = heads_from(v_BNV, v, h, w)
            run_HNN = bias_HNN[first : first + h]
            if mask is None or self.is_fused(k, w):
                bias_BHNN = window_bias(run_HNN, mask, q_BHNK.shape[0])
                out_BHNW = self.attended(q_BHNK, k_BHNK, v_BHNW, bias_BHNN, False, k, w)
            else:
                attn_BHNN = window_map(q_BHNK, k_BHNK, run_HNN, mask, self.scale, k == 0)
                out_BHNW = self.attn_drop(attn_BHNN) @ v_BHNW
            outputs.append(out_BHNW.transpose(1, 2).flatten(2))
        out_BND: Tensor = self.proj_drop(self.proj(self.gathered(outputs)))
        return out_BND


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


def with_biases(qkv_BNC: Tensor, q_bias: Tensor | None, v_bias: Tensor | None) -> Tensor:
    """Add the biases of queries and values that an attention keeps outside of its layer."""
    if q_bias is None or v_bias is None:
        return qkv_BNC
    return qkv_BNC + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])


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
