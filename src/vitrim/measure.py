"""Measure a network: exact params and MACs, latency, and the record of both that a report holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitrim.network import structure
from vitrim.network.structure import blocks_of

if TYPE_CHECKING:
    pass

InputSize = int | Sequence[int]
"""Pixels: a side, (height, width) or (channels, height, width)."""


class Count(NamedTuple):
    """Exact integers of one network at one input size."""

    params: int
    macs: int
    flops: int


class Census(NamedTuple):
    """A count and, per layer asked for, the positions its weight is applied at for one image."""

    total: Count
    positions: Mapping[str, int]


def count(net: nn.Module, input_size: InputSize) -> Count:
    """Count the parameters, and the multiply-accumulates and FLOPs of one image's forward pass.

    Convolutions, Linears and the two attention matmuls count; norms, biases, activations and
    softmax do not. FLOPs are twice the MACs. Runs on the meta device, in seconds and without
    memory, because on CPU the fused attention kernel hides its matmuls from the counter.

    ViT-B/16 at 224 px: 86,567,656 params, 17,563,828,224 MACs, 35,127,656,448 FLOPs.
    """
    return census(net, input_size, ()).total


def census(net: nn.Module, input_size: InputSize, layers: Sequence[str]) -> Census:
    """Count as `count` does and note how many positions each of `layers` is applied at."""
    positions: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows: Any = getattr(module, "out_features", None) or module.weight.shape[0]  # type: ignore[index]
            positions[name] = output.numel() // rows

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    tensors = {
        name: tensor.detach().to("meta")
        for named in (net.named_parameters(), net.named_buffers())
        for name, tensor in named
    }
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    image = torch.empty(1, *image_shape(net, input_size), device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        with torch.no_grad(), counter:
            functional_call(net, tensors, (image,))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in hooks:
            handle.remove()
    flops = int(counter.get_total_flops())
    params = sum(parameter.numel() for parameter in net.parameters())
    return Census(Count(params, flops // 2, flops), positions)


def image_shape(net: nn.Module, input_size: InputSize) -> tuple[int, int, int]:
    """Return (channels, height, width); channels default to those of the first convolution."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) == 3:
        return size[0], size[1], size[2]
    stem = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if stem is None else stem.in_channels
    return channels, size[0], size[1]


class Latency(NamedTuple):
    """Milliseconds of one forward pass over its repetitions, and of single modules by path."""

    median: float
    mean: float
    std: float
    blocks: Mapping[str, Latency] = {}


def latencies(
    nets: Sequence[nn.Module],
    input_size: InputSize,
    *,
    batch: int,
    repeats: int,
    device: str,
    blocks: bool,
) -> list[Latency]:
    """Return how long each network takes for one forward pass of `batch` images.

    The networks take turns, so that drift of the machine's speed hits all of them alike; one
    untimed pass each comes first. With `blocks` every residual block is timed as well, in passes of
    their own. Weights stay where they are moved to: pass networks you own.
    """
    nets = [net.to(device).eval() for net in nets]
    x = torch.zeros(batch, *image_shape(nets[0], input_size), device=device)
    whole: list[list[float]] = [[] for _ in nets]
    parts: list[dict[str, list[float]]] = [{} for _ in nets]
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for net, seen in zip(nets, whole, strict=True):
                start = _now(x)
                net(x)
                if turn:
                    seen.append(_now(x) - start)
        for _ in range(repeats):
            for net, found in zip(nets if blocks else (), parts, strict=False):
                with _timed(net, x, found):
                    net(x)
    return [
        _latency(seen)._replace(blocks={name: _latency(part) for name, part in found.items()})
        for seen, found in zip(whole, parts, strict=True)
    ]


def in_turns(calls: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Return milliseconds of every call, `repeats` of each by turns, after one untimed round."""
    seen: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, times in zip(calls, seen, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                times.append(1e3 * (time.perf_counter() - start))
    return seen


def _latency(seen: Sequence[float]) -> Latency:
    return Latency(statistics.median(seen), statistics.mean(seen), statistics.pstdev(seen))


def _now(x: Tensor) -> float:
    """Return milliseconds from some point in the past, once all work on `x` is done."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


@contextmanager
def _timed(net: nn.Module, x: Tensor, found: dict[str, list[float]]) -> Iterator[None]:
    """Note in `found` how long each residual block takes while the context lasts."""
    begun: dict[str, float] = {}

    def begin(name: str) -> Any:
        return lambda module, args: begun.__setitem__(name, _now(x))

    def end(name: str) -> Any:
        return lambda module, args, output: found.setdefault(name, []).append(_now(x) - begun[name])

    handles = []
    for name in blocks_of(structure(net)):
        module = net.get_submodule(name)
        handles.append(module.register_forward_pre_hook(begin(name)))
        handles.append(module.register_forward_hook(end(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
