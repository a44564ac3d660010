"""Measure a network: exact params and MACs, and latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitrim.network import UnsupportedArchitecture, structure
from vitrim.network.attention import GatheredLinear
from vitrim.network.factored import LowRankLinear, SplitLinear
from vitrim.network.proof import stem_channels
from vitrim.network.structure import blocks_of

InputSize = int | Sequence[int]
"""Pixels: a side, (height, width) or (channels, height, width)."""


class InputSizeError(UnsupportedArchitecture):
    """Images of a size that the network cannot process."""


_ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


class Count(NamedTuple):
    """Exact integers of one network at one input size."""

    params: int
    macs: int
    flops: int


class LayerCounts(NamedTuple):
    """A count and, for each requested layer, the positions its weight is applied at per image."""

    total: Count
    positions: Mapping[str, int]


def count(net: nn.Module, input_size: InputSize) -> Count:
    """Count the parameters, and the multiply-accumulates and FLOPs of one image's forward pass.

    Convolutions, Linears and the two attention matmuls are counted; norms, biases, activations and
    softmax are not. FLOPs are twice the MACs. Runs on the meta device, in seconds and without
    memory, because on CPU the fused attention kernel hides its matmuls from the counter.

    ViT-B/16 at 224 px: 86,567,656 params, 17,563,828,224 MACs, 35,127,656,448 FLOPs.
    """
    return count_layers(net, input_size, ()).total


def count_layers(net: nn.Module, input_size: InputSize, layers: Sequence[str]) -> LayerCounts:
    """Count as `count` does, and the positions that each of `layers` is applied at."""
    positions: dict[str, int] = {}

    def recording(name: str) -> _ForwardHook:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            positions[name] = output.numel() // _n_outputs(module)

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(recording(name)) for name in layers]
    tensors = {
        name: tensor.detach().to("meta")
        for named in (net.named_parameters(), net.named_buffers())
        for name, tensor in named
    }
    image = torch.empty(1, *image_shape(net, input_size), device="meta", dtype=_dtype(net))
    counter = FlopCounterMode(display=False)
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        with torch.no_grad(), counter:
            functional_call(net, tensors, (image,))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputSizeError(
            f"{type(net).__name__} cannot process images of {tuple(image.shape[1:])} (channels, "
            f"height, width): {reason}; supported: the size that it was built for, or multiples of "
            "its patches where it takes any size"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in hooks:
            handle.remove()
    flops = int(counter.get_total_flops())
    params = sum(parameter.numel() for parameter in net.parameters())
    return LayerCounts(Count(params, flops // 2, flops), positions)


def _n_outputs(layer: nn.Module) -> int:
    """Return the number of outputs of a layer at one position."""
    if isinstance(layer, nn.Linear | GatheredLinear | LowRankLinear | SplitLinear):
        return layer.out_features
    weight = layer.weight
    assert isinstance(weight, Tensor)  # no Parameter while the network is called with meta tensors
    return weight.shape[0]


def image_shape(net: nn.Module, input_size: InputSize) -> tuple[int, int, int]:
    """Return (channels, height, width); channels default to those of the first convolution."""
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) == 3:
        return size[0], size[1], size[2]
    return stem_channels(net) or 3, size[0], size[1]


def _dtype(net: nn.Module) -> torch.dtype:
    """Return the dtype of the weights, which images must have."""
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


class Latency(NamedTuple):
    """Milliseconds of one forward pass over its repetitions, and of residual blocks by path."""

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

    The passes of the networks are interleaved, so that changes of the machine's speed affect all of
    them equally; one untimed pass each comes first. With `blocks` every residual block is timed in
    further passes. The networks are moved to `device` in place.
    """
    nets = [net.to(device).eval() for net in nets]
    x = torch.zeros(batch, *image_shape(nets[0], input_size), device=device, dtype=_dtype(nets[0]))
    totals: list[list[float]] = [[] for _ in nets]
    of_blocks: list[dict[str, list[float]]] = [{} for _ in nets]
    with torch.inference_mode():
        for repetition in range(repeats + 1):
            for net, times in zip(nets, totals, strict=True):
                start = _synchronised_ms(x)
                net(x)
                if repetition:
                    times.append(_synchronised_ms(x) - start)
        for _ in range(repeats):
            for net, block_times in zip(nets if blocks else (), of_blocks, strict=False):
                with _timed_blocks(net, x, block_times):
                    net(x)
    return [
        _latency(times)._replace(blocks={name: _latency(ms) for name, ms in block_times.items()})
        for times, block_times in zip(totals, of_blocks, strict=True)
    ]


def conditions(net: nn.Module) -> dict[str, object]:
    """Return what a latency depends on besides its settings: precision and threads of PyTorch."""
    types = {tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    precision = "+".join(sorted(names.get(kind, str(kind)) for kind in types))
    return {"precision": precision or "fp32", "threads": torch.get_num_threads()}


def interleaved_times(calls: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Return milliseconds of `repeats` interleaved rounds of all calls, after an untimed round."""
    durations: list[list[float]] = [[] for _ in calls]
    for repetition in range(repeats + 1):
        for call, times in zip(calls, durations, strict=True):
            start = time.perf_counter()
            call()
            if repetition:
                times.append(1e3 * (time.perf_counter() - start))
    return durations


def _latency(times: Sequence[float]) -> Latency:
    return Latency(statistics.median(times), statistics.mean(times), statistics.pstdev(times))


def _synchronised_ms(x: Tensor) -> float:
    """Return the clock in milliseconds once all work on the device of `x` is done."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


@contextmanager
def _timed_blocks(net: nn.Module, x: Tensor, times: dict[str, list[float]]) -> Iterator[None]:
    """Record in `times` how long each residual block takes in this context."""
    starts: dict[str, float] = {}

    def begin(name: str) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, args: object) -> None:
            starts[name] = _synchronised_ms(x)

        return hook

    def end(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            times.setdefault(name, []).append(_synchronised_ms(x) - starts[name])

        return hook

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
