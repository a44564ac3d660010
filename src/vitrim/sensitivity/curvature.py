"""How errors inside a network change its decision: second moments of inputs and of gradients.

For an image with logits z and p = softmax(z / T), random signs r give e = sqrt(p) r and s = e - p
sum(e), with E[s s^T] = diag(p) - p p^T: the Hessian of the KL divergence from p, times T^2. The
gradients g of <z, s> then have the Gauss-Newton matrix of that divergence as their second moment,
without bias, from one backward pass. A network without a classifier has features in place of logits
and s = F^(-1/2) r, with F the covariance of the features: the divergence is then the squared error
of the features in units of their variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def directions(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return s of each image, (B, classes): E[s s^T] = diag(p) - p p^T, p = softmax(z / T)."""
    p = (logits.detach().float() / temperature).softmax(1)
    e = p.sqrt() * _signs(p, generator)
    return e - p * e.sum(1, keepdim=True)


def whitened(features: Tensor, root: Tensor, generator: torch.Generator) -> Tensor:
    """Return s of each image, (B, D): E[s s^T] = F^-1, `root` is F^(-1/2), (D, D)."""
    return _signs(features, generator) @ root.to(features)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator).to(like)
    return 2 * signs - 1


@contextmanager
def visible_attention(net: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let the attentions at these module paths compute their maps, where hooks can read them."""
    attentions = [net.get_submodule(name) for name in names]
    fused = [bool(attention.fused_attn) for attention in attentions]
    try:
        for attention in attentions:
            attention.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for attention, was in zip(attentions, fused, strict=True):
            attention.fused_attn = was  # type: ignore[assignment]


def score_gradients(attn_BHNN: Tensor, gradient_BHNN: Tensor) -> Tensor:
    """Return squared gradients by the scores before the softmax, from those by the map."""
    by_scores = torch._softmax_backward_data(gradient_BHNN, attn_BHNN, -1, attn_BHNN.dtype)
    return by_scores.square_()
