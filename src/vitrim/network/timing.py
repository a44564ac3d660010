"""Time forward passes: by the clock of their device, interleaved, with heads arranged for speed.

A `Clock` measures by the time of the process, or by events in the stream of a GPU, which works on
while the CPU goes ahead.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from vitrim.network.dispatch import UnsupportedArchitecture
from vitrim.network.head_runs import (
    ARRANGEMENTS,
    Arrangement,
    arrange_heads,
    sliced_attentions,
)

Heads = Arrangement | Literal["fastest"]
"""How cut attentions are run: in an arrangement, or in the fastest one, by a measurement."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PASSES_BEFORE_CAPTURE = 3
_FASTEST: dict[tuple[object, ...], Arrangement] = {}


Stop = Callable[[], Callable[[], float]]
"""Marks the end of what is timed; returns what waits for it and gives the milliseconds."""


class Clock(Protocol):
    """What measures time on a device."""

    warm_up: int
    """Untimed passes that come first."""

    def start(self) -> Stop:
        """Mark the start of what is timed, behind the work that was started before."""


class CpuClock:
    """The time of the process, for work that is done when its call returns."""

    warm_up = 1

    def start(self) -> Stop:
        """Read the time now; the other moment is when the result is called."""
        began = time.perf_counter()

        def stop() -> Callable[[], float]:
            elapsed = 1e3 * (time.perf_counter() - began)
            return lambda: elapsed

        return stop


class CudaClock:
    """Events in the current stream of a GPU: what the GPU needs, its waiting for calls included."""

    warm_up = 10

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    def start(self) -> Stop:
        """Record an event behind the kernels that were launched so far."""
        began = self._event()

        def stop() -> Callable[[], float]:
            ended = self._event()

            def milliseconds() -> float:
                ended.synchronize()
                return float(began.elapsed_time(ended))

            return milliseconds

        return stop

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


def clock_of(device: str | torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock()


def interleaved_times(
    calls: Sequence[Callable[[], object]], repeats: int, *, clock: Clock | None = None
) -> list[list[float]]:
    """Return milliseconds of `repeats` interleaved rounds of all calls, after untimed rounds.

    `clock` is by default the CPU's.
    """
    clock = clock or CpuClock()
    durations: list[list[float]] = [[] for _ in calls]
    for repetition in range(-clock.warm_up, repeats):
        for call, times in zip(calls, durations, strict=True):
            stop = clock.start()
            call()
            milliseconds = stop()()
            if repetition >= 0:
                times.append(milliseconds)
    return durations


def forward_pass(
    net: Callable[[Tensor], object], x: Tensor, *, graphs: bool = False
) -> Callable[[], object]:
    """Return a forward pass of `net` on `x`; it does not wait for a GPU.

    With `graphs` it is captured into a CUDA graph, which launches all kernels at once.

    Raises:
        UnsupportedArchitecture: the network cannot be captured: it reads values on the CPU.
    """
    if not graphs:
        return partial(net, x)
    with torch.cuda.device(x.device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose kernels and allocate before the capture
            for _ in range(_PASSES_BEFORE_CAPTURE):
                net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                output = net(x)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedArchitecture(
                f"{type(net).__name__} cannot be captured into a CUDA graph: {reason}; time it "
                "without graphs"
            ) from error

    def replay(_alive: object = (net, x, output)) -> None:  # a replay uses their memory
        graph.replay()

    return replay


def fastest_heads(net: nn.Module, images: Tensor, *, repeats: int = 5) -> Arrangement:
    """Return the arrangement of heads with the fastest forward pass of `net` on `images`.

    `vitrim.arrange_heads` sets it. What was measured once in this process, for heads of these
    widths, images of this shape and this device, is not measured again. Both must be on the device
    and in the precision that are asked about; the network runs as before afterwards.

    Args:
        net: a network, dense or compact.
        images: (batch, channels, height, width).
        repeats: timed passes for each arrangement, interleaved.
    """
    attentions = sliced_attentions(net).values()
    widths = tuple((attn.qk_dims, attn.v_dims) for attn in attentions)
    if all(len({*qk, *v}) == 1 for qk, v in widths):
        return "runs"  # all are the same
    gpu = torch.cuda.get_device_name(images.device) if images.is_cuda else torch.get_num_threads()
    key = (type(net), widths, images.shape, images.dtype, images.device, gpu)
    if key not in _FASTEST:
        twins = [arrange_heads(_twin(net), how) for how in ARRANGEMENTS]
        with torch.inference_mode():
            calls = [forward_pass(twin, images) for twin in twins]
            times = interleaved_times(calls, repeats, clock=clock_of(images.device))
        _FASTEST[key] = quickest(times)
    return _FASTEST[key]


def chosen_heads(net: nn.Module, images: Tensor, heads: Heads) -> Arrangement:
    """Return `heads`, or the fastest arrangement if it asks for that."""
    return fastest_heads(net, images) if heads == "fastest" else heads


def quickest(times: Sequence[Sequence[float]]) -> Arrangement:
    """Return the arrangement with the least median of the times, which are in the order of all."""
    return min(zip(map(statistics.median, times), ARRANGEMENTS, strict=True))[1]


def _twin(net: nn.Module) -> nn.Module:
    """Return a copy of `net` with the same parameters, in evaluation mode."""
    return copy.deepcopy(net, {id(p): p for p in net.parameters()}).eval()
