"""BatchNorms that look folded for inference: their statistics are estimated before training.

A checkpoint that was converted from one made for inference often has its BatchNorms folded into the
convolutions: what is left has means of zero, one and the same variance, and the biases. In
evaluation mode that is the network. A training step, however, normalises by the batch, which the
weights were not made for, and destroys the network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_log = logging.getLogger(__name__)


def folded_batchnorms(net: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms of `net` if they look folded for inference, else none.

    They do if all means are 0 and all variances the same, but some bias is not 0: in a fresh
    network all biases are 0 as well.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if not norms or any(norm.running_var is None or norm.bias is None for norm in norms):
        return []
    means, variances, biases = (
        torch.cat([tensor.detach().flatten() for tensor in tensors])
        for tensors in zip(
            *((norm.running_mean, norm.running_var, norm.bias) for norm in norms), strict=True
        )
    )
    unseen = not means.any() and bool((variances == variances[0]).all())
    return norms if unseen and bool(biases.any()) else []


@torch.no_grad()
def estimate_batchnorm(net: nn.Module, batches: Callable[[], Iterable[Sequence[Tensor]]]) -> None:
    """Give folded BatchNorms the mean and variance of their inputs, and weights to match.

    The outputs of `net` stay the same to rounding, in evaluation mode, and now in training mode as
    well. A network whose BatchNorms have statistics is left alone.

    Args:
        net: changed in place.
        batches: returns batches of images (B, C, H, W) and labels; called only if they are needed.
    """
    norms = folded_batchnorms(net)
    if not norms:
        return
    sums, images = _sums(net, norms, batches())
    for norm in norms:
        n, total, squares = sums[norm].unbind(1)
        mean = (total / n).to(norm.bias)
        variance = (squares / n - (total / n).square()).clamp_min(0).to(norm.bias)
        running = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        old = (running[1] + norm.eps).sqrt()
        norm.bias.add_(norm.weight * mean / old)
        norm.weight.mul_((variance + norm.eps).sqrt() / old)
        for buffer, statistic in zip(running, (mean, variance), strict=True):
            buffer.copy_(statistic)
    _log.info(
        "estimated the statistics of %d BatchNorms on %d images (they look folded for inference), "
        "and adapted their weights",
        len(norms),
        images,
    )


def _sums(
    net: nn.Module, norms: Iterable[nn.Module], batches: Iterable[Sequence[Tensor]]
) -> tuple[dict[nn.Module, Tensor], int]:
    """Return by BatchNorm the sums of 1, x and x^2 over its inputs, (C, 3), and the image count."""
    sums: dict[nn.Module, Tensor] = {}

    def add(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)  # channels first
        more = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)], 1)
        sums[norm] = sums[norm] + more if norm in sums else more

    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    training = net.training
    net.eval()
    try:
        images = 0
        for batch in batches:
            net(batch[0].to(next(net.parameters()).device))
            images += len(batch[0])
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
    return sums, images
