"""Heads of several widths: what all cut attentions share, and how such heads are run.

The heads of a cut attention are arranged in one of three ways, which compute the same:

    runs      neighbouring heads of equal widths together; by the fused kernel where query-key and
              value width are equal, by plain operations where they differ
    fused     the same runs, all by the fused kernel: the narrower of the two widths is padded
    padded    all heads in one call, padded to the widest: few kernels for some useless products

`runs` is what networks are loaded with. Which one is fastest depends on the device, the widths and
the batch (`vitrim.network.timing.fastest_heads`). Padding consists of zeros, which change no
product: the outputs differ by rounding. Parameters and state dict are the same in all three.

The legend is in `vitrim.network.attention`. Annotations are evaluated, because TorchScript reads no
strings.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.network.attention_maps import attend, attention_map

Arrangement = Literal["runs", "fused", "padded"]
ARRANGEMENTS: tuple[Arrangement, ...] = get_args(Arrangement)

HeadRun = tuple[int, int, int, int, int, int]
"""Neighbouring heads of equal widths: index of the first head, number of heads, first column and
width of each head in the queries (and keys), first column and width of each head in the values."""


class SlicedHeads:
    """What all cut attentions share: heads of several widths, computed in runs of equal heads.

    The softmax scale is the dense network's and is passed to the kernel, which would otherwise
    compute it from the new width.
    """

    if TYPE_CHECKING:  # TorchScript cannot read annotations of modules
        attn_drop: nn.Dropout
        scale: float
        fused_attn: bool
        training: bool
        padded_columns: Tensor | None
        kept_columns: Tensor | None

    def set_widths(self, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]) -> None:
        """Set the query-key and the value width of every head, each of shape (heads,)."""
        self.qk_dims = qk_dims
        self.v_dims = v_dims
        self.num_heads = len(v_dims)
        self.arrange("runs")

    def arrange(self, arrangement: Arrangement) -> None:
        """Choose how the heads are run; see the module."""
        assert isinstance(self, nn.Module)
        self.arrangement = arrangement
        self.pads_runs = arrangement == "fused"
        self.head_runs = head_runs(self.qk_dims, self.v_dims)
        self.qkv_sizes = [sum(self.qk_dims), sum(self.qk_dims), sum(self.v_dims)]
        padded = kept = None
        if arrangement == "padded":
            width, h = max(*self.qk_dims, *self.v_dims), self.num_heads
            padded, kept = _padding(self.qk_dims, self.v_dims, width)
            device = next((p.device for p in self.parameters()), None)
            padded, kept = padded.to(device), kept.to(device)
            self.head_runs = [(0, h, 0, width, 0, width)]
            self.qkv_sizes = [h * width] * 3
        self.register_buffer("padded_columns", padded, persistent=False)
        self.register_buffer("kept_columns", kept, persistent=False)

    def spread(self, qkv_BNC: Tensor) -> Tensor:
        """Return queries, keys and values with zeros up to one width, if heads are padded."""
        columns = self.padded_columns
        if columns is None:
            return qkv_BNC
        rows = qkv_BNC.flatten(0, 1)
        wide = rows.new_zeros([rows.shape[0], 3 * self.qkv_sizes[0]])
        wide.scatter_(1, columns.expand_as(rows), rows)
        return torch.unflatten(wide, 0, qkv_BNC.shape[:2])

    def gathered(self, outputs_BNV: list[Tensor]) -> Tensor:
        """Return the outputs of all runs of heads, concatenated, without padding: (B, N, V)."""
        out_BNV = join_runs(outputs_BNV)
        columns = self.kept_columns
        if columns is None:
            return out_BNV
        rows = out_BNV.flatten(0, 1).index_select(1, columns)
        return torch.unflatten(rows, 0, out_BNV.shape[:2])

    def is_fused(self, k: int, w: int) -> bool:
        """Return whether the fused kernel runs heads of these widths."""
        return self.fused_attn and (k == w or (self.pads_runs and k > 0))

    def attended(
        self,
        q_BHNK: Tensor,
        k_BHNK: Tensor,
        v_BHNW: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        k: int,
        w: int,
    ) -> Tensor:
        """Return the output of a run of heads with K = `k` and W = `w`, shape (B, H, N, W).

        What the fused kernel does not run calls the dropout module on the attention map, where
        hooks can read it.
        """
        if self.is_fused(k, w):
            if k < w:
                q_BHNK, k_BHNK = F.pad(q_BHNK, (0, w - k)), F.pad(k_BHNK, (0, w - k))
            if w < k:
                v_BHNW = F.pad(v_BHNW, (0, k - w))
            dropout = self.attn_drop.p if self.training else 0.0
            out_BHNK = attend(q_BHNK, k_BHNK, v_BHNW, mask, is_causal, self.scale, dropout)
            return out_BHNK[..., :w] if w < k else out_BHNK
        attn_BHNN = attention_map(q_BHNK, k_BHNK, mask, is_causal, self.scale, k == 0)
        out_BHNW: Tensor = self.attn_drop(attn_BHNN) @ v_BHNW
        return out_BHNW

    def extra_repr(self) -> str:
        """Show the widths per head, and how they are run."""
        how = "" if self.arrangement == "runs" else f", arrangement={self.arrangement}"
        return f"qk_dims={self.qk_dims}, v_dims={self.v_dims}{how}"


def arrange_heads(net: nn.Module, arrangement: Arrangement) -> nn.Module:
    """Run the heads of all cut attentions of `net` so from now on, in place; return `net`.

    Args:
        net: a compact network, in any mode and on any device. A dense one has nothing to arrange.
        arrangement: `runs`, `fused` or `padded`; the module has their meaning. It is not saved.

    Raises:
        ConfigError: another word.
    """
    if arrangement not in ARRANGEMENTS:
        raise ConfigError(f"arrangement={arrangement!r}: expected one of {', '.join(ARRANGEMENTS)}")
    for attention in sliced_attentions(net).values():
        attention.arrange(arrangement)
    return net


@contextmanager
def arranged(net: nn.Module, arrangement: Arrangement) -> Iterator[None]:
    """Run the heads of `net` so in this context, and as before after it."""
    before = {attn: attn.arrangement for attn in sliced_attentions(net).values()}
    arrange_heads(net, arrangement)
    try:
        yield
    finally:
        for attention, earlier in before.items():
            attention.arrange(earlier)


def sliced_attentions(net: nn.Module) -> Mapping[str, SlicedHeads]:
    """Return the cut attentions of `net` by module path."""
    return {name: part for name, part in net.named_modules() if isinstance(part, SlicedHeads)}


def head_runs(qk_dims: Sequence[int], v_dims: Sequence[int]) -> list[HeadRun]:
    """Return the runs of heads of equal widths, in order.

    >>> head_runs((2, 2, 1), (4, 4, 4))
    [(0, 2, 0, 2, 0, 4), (2, 1, 4, 1, 8, 4)]
    """
    runs = []
    head = qk = v = 0
    for (k, w), group in groupby(zip(qk_dims, v_dims, strict=True)):
        h = len(list(group))
        runs.append((head, h, qk, k, v, w))
        head, qk, v = head + h, qk + h * k, v + h * w
    return runs


def heads_from(x_BNC: Tensor, start: int, n_heads: int, head_dim: int) -> Tensor:
    """Return `n_heads` heads from column `start`, shape (B, H, N, head_dim)."""
    run_BNC = x_BNC[..., start : start + n_heads * head_dim]
    b, n = x_BNC.shape[0], x_BNC.shape[1]
    return run_BNC.view(b, n, n_heads, head_dim).transpose(1, 2)


def join_runs(outputs_BNV: list[Tensor]) -> Tensor:
    """Return the outputs of all runs of heads, concatenated: (B, N, V)."""
    return outputs_BNV[0] if len(outputs_BNV) == 1 else torch.cat(outputs_BNV, dim=-1)


def _padding(qk_dims: Sequence[int], v_dims: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Return where the columns of queries, keys and values go, and the columns of outputs to keep.

    Both count in columns of padded heads, `width` each: those of queries, keys and values lie side
    by side, (3 * heads * width).
    """
    h = len(v_dims)
    columns = [
        part * h * width + head * width + unit
        for part, dims in enumerate((qk_dims, qk_dims, v_dims))
        for head, dim in enumerate(dims)
        for unit in range(dim)
    ]
    kept = [head * width + unit for head, dim in enumerate(v_dims) for unit in range(dim)]
    return torch.tensor(columns), torch.tensor(kept)
