"""BatchNorms that were never in training: counted before it begins, or it would undo the network.

A checkpoint that was converted from one made for inference often has its norms folded into the
convolutions: they are left with means of zero, one variance and the biases. Used, that is the
network; but a step of training normalises by the batch, which is not what its weights were made
for, and nothing of it is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_log = logging.getLogger(__name__)


def uncounted(net: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms of `net`, if all have trained biases, but none has seen an image.

    Then all means are 0 and all variances the same; in a fresh network all biases are 0, too.
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
    never = not means.any() and bool((variances == variances[0]).all())
    return norms if never and bool(biases.any()) else []


@torch.no_grad()
def count(net: nn.Module, batches: Callable[[], Iterable[Any]]) -> None:
    """Give such norms the mean and the variance of what enters them, and weights to match.

    What `net` computes stays the same to rounding, and a training step now begins there, too. A
    network whose norms have counted is left alone.

    Args:
        net: changed in place.
        batches: returns batches of images (B, C, H, W) and labels; called only if they are needed.
    """
    norms = uncounted(net)
    if not norms:
        return
    sums: dict[nn.Module, Tensor] = {}  # of each: 1, x and x^2 over images and places, (C, 3)

    def add(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)  # channels first
        more = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)], 1)
        sums[norm] = sums[norm] + more if norm in sums else more

    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    training = net.training
    net.eval()
    try:
        images = 0
        for batch in batches():
            net(batch[0].to(next(net.parameters()).device))
            images += len(batch[0])
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
    for norm in norms:
        n, total, squares = sums[norm].unbind(1)
        mean = (total / n).to(norm.bias)
        variance = (squares / n - (total / n).square()).clamp_min(0).to(norm.bias)
        running = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        old = (running[1] + norm.eps).sqrt()
        norm.bias.add_(norm.weight * mean / old)
        norm.weight.mul_((variance + norm.eps).sqrt() / old)
        for buffer, found in zip(running, (mean, variance), strict=True):
            buffer.copy_(found)
    _log.info(
        "%d norms had never counted (folded for inference?): they did, on %d images, and their "
        "weights were adapted",
        len(norms),
        images,
    )
