"""Activations of a network, captured while it runs on as many images as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

Points = Sequence[tuple[str, bool]]
"""Paths of modules, and whether their output is meant (else their input)."""

_CAPTURED_BYTES = 1 << 30
_WITH_GRAPH = 1.5
"""How much more is needed where gradients are computed: for them and the rest of the graph."""


@contextmanager
def capture(net: nn.Module, points: Points) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that gets the activations of modules, by their path, while `net` runs.

    Of several calls of a module, the first counts.

    Args:
        net: the network.
        points: paths of modules, and whether their output is meant (else their input).
    """
    activations: dict[str, Tensor] = {}

    def hook_for(name: str, *, output: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], *out: Tensor) -> None:
            activations.setdefault(name, out[0] if output else args[0])

        return hook

    handles = [
        net.get_submodule(name).register_forward_hook(hook_for(name, output=True))
        if output
        else net.get_submodule(name).register_forward_pre_hook(hook_for(name, output=False))
        for name, output in points
    ]
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


class Batches:
    """Split batches of images so that what is captured of one part takes at most 1 GiB.

    How much an image takes is measured on the first one. Batches that fit are left whole.

    Args:
        points: what is captured; each sequence by a `capture` of its own.
        graph: whether gradients are computed of it, which takes half as much again.
    """

    def __init__(self, *points: Points, graph: bool = False) -> None:
        self._points = points
        self._limit = int(_CAPTURED_BYTES / (_WITH_GRAPH if graph else 1))
        self._most: int | None = None

    def of(self, images: Tensor, net: nn.Module) -> Sequence[Tensor]:
        """Return the parts of a batch of images (B, C, H, W), in order; no part is empty.

        Args:
            images: the batch.
            net: the network, in evaluation mode, whose activations are captured.
        """
        if len(images) <= 1:
            return (images,) if len(images) else ()
        if self._most is None:
            self._most = max(1, self._limit // max(1, self._bytes_of(images[:1], net)))
        return torch.split(images, self._most)

    @torch.no_grad()
    def _bytes_of(self, images: Tensor, net: nn.Module) -> int:
        with ExitStack() as stack:
            captured = [stack.enter_context(capture(net, each)) for each in self._points]
            net(images)
        tensors = [tensor for each in captured for tensor in each.values()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
