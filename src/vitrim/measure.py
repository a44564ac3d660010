"""Measure a network: exact params and MACs, and latency."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitrim.network import UnsupportedArchitecture, structure
from vitrim.network.attention import GatheredLinear
from vitrim.network.factored import LowRankLinear, SplitLinear
from vitrim.network.head_runs import Arrangement, arranged
from vitrim.network.proof import stem_channels
from vitrim.network.structure import blocks_of
from vitrim.network.timing import (
    PRECISIONS,
    Clock,
    Heads,
    Stop,
    chosen_heads,
    clock_of,
    forward_pass,
    interleaved_times,
)

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

    Convolutions, Linears and the two attention matmuls are counted; norms, biases, activations,
    softmax and the padding of heads are not. FLOPs are twice the MACs. Runs on the meta device, in
    seconds and without memory, because on CPU the fused attention kernel hides its matmuls from the
    counter.

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
        with arranged(net, "runs"), torch.no_grad(), counter:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySettings:
    """How the latency of the dense and the compact network is measured; see `latencies`."""

    batch: int
    repeats: int
    device: str
    blocks: bool
    heads: Heads = "runs"
    precision: str | None = None
    graphs: bool = False


class Latency(NamedTuple):
    """Milliseconds of one forward pass over its repetitions, and of residual blocks by path.

    `heads` says how cut attentions were run (`vitrim.network.head_runs`).
    """

    median: float
    mean: float
    std: float
    blocks: Mapping[str, Latency] = {}
    heads: Arrangement = "runs"


def latencies(
    nets: Sequence[nn.Module],
    input_size: InputSize,
    *,
    batch: int,
    repeats: int,
    device: str,
    blocks: bool,
    heads: Heads = "runs",
    precision: str | None = None,
    graphs: bool = False,
) -> list[Latency]:
    """Return how long each network takes for one forward pass of `batch` images.

    The passes of the networks are interleaved, so that changes of the machine's speed affect all of
    them equally; untimed passes come first. The networks are moved to `device` in place, except
    where another precision needs a copy.

    Args:
        nets: the networks.
        input_size: of the images.
        batch: images in a pass.
        repeats: timed passes of each network.
        device: cpu, cuda, or a GPU of several, cuda:1.
        blocks: whether every residual block is timed, in further passes.
        heads: how cut attentions are run; `fastest`: as a short measurement before says.
        precision: fp32 or bf16; None: that of the weights.
        graphs: whether the passes are replayed from CUDA graphs.
    """
    moved = [in_precision(net, device, precision).eval() for net in nets]
    clock = clock_of(device)
    images = [zeros_for(net, batch, input_size) for net in moved]
    of_blocks: list[dict[str, list[float]]] = [{} for _ in nets]
    with torch.inference_mode(), ExitStack() as arrangements:
        chosen = [chosen_heads(net, x, heads) for net, x in zip(moved, images, strict=True)]
        for net, how in zip(moved, chosen, strict=True):
            arrangements.enter_context(arranged(net, how))
        passes = [forward_pass(*pair, graphs=graphs) for pair in zip(moved, images, strict=True)]
        totals = interleaved_times(passes, repeats, clock=clock)
        for _ in range(repeats if blocks else 0):
            for net, x, block_times in zip(moved, images, of_blocks, strict=True):
                with _timed_blocks(net, clock, block_times):
                    net(x)
    return [
        _latency(times)._replace(
            blocks={name: _latency(ms) for name, ms in block_times.items()}, heads=how
        )
        for times, block_times, how in zip(totals, of_blocks, chosen, strict=True)
    ]


def in_precision(net: nn.Module, device: str, precision: str | None) -> nn.Module:
    """Return `net` on a device, moved in place, or a copy of it in another precision."""
    if precision is None or PRECISIONS[precision] == _dtype(net):
        return net.to(device)
    return copy.deepcopy(net).to(device, PRECISIONS[precision])


def zeros_for(net: nn.Module, batch: int, input_size: InputSize) -> Tensor:
    """Return images of zeros on the device and in the precision of `net`."""
    device = next((p.device for p in net.parameters()), None)
    return torch.zeros(batch, *image_shape(net, input_size), device=device, dtype=_dtype(net))


def latency_entry(
    settings: LatencySettings, compact: nn.Module, heads: Arrangement
) -> dict[str, object]:
    """Return how latency was measured, as reports have it: what latencies are compared by.

    `precision` is that of the weights by default, and says what a GPU computed in TF32 in place of
    fp32; `device` says whether passes came from CUDA graphs; `heads` is how those of the compact
    network were run.
    """
    types = {tensor.dtype for tensor in compact.parameters() if tensor.is_floating_point()}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    own = "+".join(sorted(names.get(kind, str(kind)) for kind in types)) or "fp32"
    precision = settings.precision or own
    if torch.device(settings.device).type == "cuda" and precision == "fp32" and tf32() != "off":
        precision = f"fp32, TF32 {tf32()}"
    return {
        "batch": settings.batch,
        "repeats": settings.repeats,
        "device": f"{settings.device}, graphs" if settings.graphs else settings.device,
        "blocks": settings.blocks,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "heads": heads,
    }


def tf32() -> str:
    """Return what GPUs compute in TF32 where tensors are fp32.

    "off", "in matmuls", "in convolutions" or "everywhere".
    """
    matmuls = torch.get_float32_matmul_precision() != "highest"
    convolutions = bool(torch.backends.cudnn.allow_tf32)
    names = {
        (True, True): "everywhere",
        (True, False): "in matmuls",
        (False, True): "in convolutions",
    }
    return names.get((matmuls, convolutions), "off")


def _latency(times: Sequence[float]) -> Latency:
    return Latency(statistics.median(times), statistics.mean(times), statistics.pstdev(times))


@contextmanager
def _timed_blocks(net: nn.Module, clock: Clock, times: dict[str, list[float]]) -> Iterator[None]:
    """Record in `times` how long each residual block takes in this context."""
    running: dict[str, Stop] = {}
    finished: list[tuple[str, Callable[[], float]]] = []

    def begin(name: str) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, args: object) -> None:
            running[name] = clock.start()

        return hook

    def end(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            finished.append((name, running[name]()))

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
    for name, milliseconds in finished:
        times.setdefault(name, []).append(milliseconds())
