"""Whether two networks compute the same: their logits of a fixed input, and what norms add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of two logits, relative to the largest logit or to 1, by dtype of the net."""


def input_shape(net: nn.Module, img_size: object = None) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a network of timm was built for.

    Args:
        net: the network.
        img_size: the argument it was built with; None: what its patches or its weights say.
    """
    config = getattr(net, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or img_size
    known = size if isinstance(size, int | tuple | list) else (height, width)
    return stem_channels(net) or channels, *_pair(known)


def stem_channels(net: nn.Module) -> int | None:
    """Return the channels that the first convolution of `net` reads; None where there is none."""
    stem = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    return None if stem is None else stem.in_channels


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def fixed_logits(net: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """Return the outputs of `net` in eval mode for one image of noise, always the same, (n,).

    Args:
        net: whose modes are as before afterwards.
        shape: of the image, (channels, height, width).
    """
    parameter = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with evaluating(net), torch.no_grad(), _eagerly(net):
        logits = net(noise.to(parameter.device, parameter.dtype))
    parts = logits if isinstance(logits, tuple | list) else (logits,)
    return torch.cat([part.flatten() for part in parts]).cpu()


def _eagerly(net: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which compiled modules of `net` run as they are written."""
    compiled = any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in net.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Set `net` to eval mode in this context."""
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def difference(net: nn.Module, twin: nn.Module, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
    """Return how `twin` differs from `net`, which has equal tensors; and the logits of `net`.

    The text is empty where both compute the same.
    """
    expected, found = fixed_logits(net, shape), fixed_logits(twin, shape)
    if expected.shape != found.shape:
        return f"it has {found.numel()} outputs in place of {expected.numel()}", expected
    if torch.equal(expected.nan_to_num(), found.nan_to_num()):
        largest = limit = 0.0
    else:
        largest = float((expected.double() - found.double()).abs().max())
        limit = _LIMITS.get(expected.dtype, 1e-5) * max(1.0, float(expected.abs().max()))
    reason = _reason(net, twin)
    if largest <= limit and not reason.startswith("epsilon"):
        return "", expected
    words = f"logits of a fixed input differ by {largest:.1e} (at most {limit:.0e} is rounding)"
    return "; ".join(part for part in (words, reason) if part), expected


def _reason(net: nn.Module, twin: nn.Module) -> str:
    """Return the first module that is another one in `twin`; empty if there is none."""
    theirs = dict(twin.named_modules())
    for name, module in net.named_modules():
        other = theirs.get(name)
        if other is None:
            continue
        eps, known = getattr(module, "eps", None), getattr(other, "eps", None)
        if eps != known:
            return f"epsilon of {name} is {eps}, timm's network has {known}"
        if type(module) is not type(other) and not _is_inert(module, other):
            kinds = f"{type(module).__name__}, in timm's network {type(other).__name__}"
            return f"{name or 'the network'} is a {kinds}"
    return ""


def _is_inert(*modules: nn.Module) -> bool:
    """Whether modules do nothing in eval mode."""
    return all(
        isinstance(module, nn.Identity | nn.Dropout) or type(module).__name__ == "DropPath"
        for module in modules
    )
