"""Attention of one run of equal heads, as functions of tensors and numbers.

torch.jit.script compiles them and torch.fx traces them; the legend is in `network.attention`.
Annotations are evaluated, because TorchScript reads no strings.
"""

import torch.fx
import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BHNK: Tensor,
    k_BHNK: Tensor,
    v_BHNW: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """Return the output of one run of equal heads by the fused kernel, shape (B, H, N, W).

    Args:
        q_BHNK: the queries.
        k_BHNK: the keys.
        v_BHNW: the values, W = K.
        mask: added to the scores or, if boolean, false where the score is -inf.
        is_causal: whether tokens attend to earlier ones only; any mask is then ignored.
        scale: of the products of queries and keys.
        dropout: the probability, 0 in evaluation mode.
    """
    return F.scaled_dot_product_attention(
        q_BHNK,
        k_BHNK,
        v_BHNW,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
    )


def attention_map(
    q_BHNK: Tensor,
    k_BHNK: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    empty: bool,
) -> Tensor:
    """Return how much each token attends to each other one, before dropout, (B, H, N, N).

    `empty` says whether queries and keys have no dims, K = 0; the others are those of `attend`.
    """
    return add_mask(scores(q_BHNK * scale, k_BHNK, empty), mask, is_causal).softmax(dim=-1)


torch.fx.wrap("add_mask")  # a trace records the call, because masks may be arguments of the network


def add_mask(attn_BHNN: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return scores after a mask; as in the fused kernel, a causal mask replaces others."""
    if is_causal:
        later = attn_BHNN.new_full(attn_BHNN.shape[-2:], float("-inf"))
        return attn_BHNN + later.triu(1)
    if mask is None:
        return attn_BHNN
    if mask.dtype == torch.bool:
        return attn_BHNN.masked_fill(~mask, float("-inf"))
    return attn_BHNN + mask


def window_bias(bias_HNN: Tensor, mask: Tensor | None, n_windows: int) -> Tensor:
    """Return what is added to the scores of all windows, (1 or n_windows, H, N, N).

    `bias_HNN` is added to those of every window, `mask` (L, N, N) to those of the L windows of each
    image.
    """
    if mask is None:
        return bias_HNN[None]
    return (bias_HNN + mask[:, None]).repeat(n_windows // mask.shape[0], 1, 1, 1)


def window_map(
    q_BHNK: Tensor, k_BHNK: Tensor, bias_HNN: Tensor, mask: Tensor, scale: float, empty: bool
) -> Tensor:
    """Return `attention_map` with the bias and the mask of `window_bias`, which is not repeated."""
    attn_BHNN = scores(q_BHNK * scale, k_BHNK, empty)
    n_images = q_BHNK.shape[0] // mask.shape[0]  # len() would be a constant of a traced graph
    by_image = torch.unflatten(attn_BHNN, 0, [n_images, mask.shape[0]])
    return (by_image + (bias_HNN + mask[:, None])).flatten(0, 1).softmax(dim=-1)


def scores(q_BHNK: Tensor, k_BHNK: Tensor, empty: bool) -> Tensor:
    """Return the products of queries and keys, (B, H, N, N).

    Without dims they are zeros: exported graphs cannot contain empty tensors.
    """
    if empty:
        b, h, n = q_BHNK.shape[0], q_BHNK.shape[1], q_BHNK.shape[2]
        return q_BHNK.new_zeros([b, h, n, k_BHNK.shape[2]])
    return q_BHNK @ k_BHNK.transpose(-2, -1)
