"""Measure a network: exact params and MACs, latency, and the record of both that a report holds."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitrim.model import structure
from vitrim.model.site import blocks_of

if TYPE_CHECKING:
    from vitrim.plan import Plan
    from vitrim.target import Cost, Target

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


Accuracy = Mapping[str, float] | None
"""Percent by name (top1, top5), or None where no images were at hand."""


def record(
    nets: tuple[nn.Module, nn.Module],
    cost: Cost,
    plan: Plan,
    times: Sequence[Latency],
    dense_accuracy: Accuracy,
    stages: Mapping[str, Accuracy],
    budget: Target,
) -> dict[str, Any]:
    """Return the numbers of a report: the dense net, the compact one, and what was kept.

    `stages` are the compact net's accuracies right after the cut and after each phase that
    followed. The compact net is counted, and the closed formula must agree.
    """
    sizes = [Count(*cost.dense_count), count(nets[1], cost.input_size)]
    formula = cost.plan(plan)
    if (formula.params, formula.macs) != sizes[1][:2]:
        raise AssertionError(f"the plan's formula gives {formula}, the counter {sizes[1]}")
    sides = [
        {**size._asdict(), **_percent(accuracy), **_milliseconds(latency)}
        for size, accuracy, latency in zip(
            sizes, (dense_accuracy, [*stages.values()][-1]), times, strict=True
        )
    ]
    return {
        "format": 1,
        "dense": sides[0],
        "compact": sides[1],
        "cut": _percent(stages["cut"]),
        "stages": {name: _percent(accuracy) for name, accuracy in stages.items()},
        "target": {"metric": budget.metric, "keep": budget.keep},
        "kept": {name: sides[1][name] / sides[0][name] for name in ("params", "macs")},
    }


def _milliseconds(latency: Latency) -> dict[str, Any]:
    blocks = {name: [part.mean, part.std] for name, part in latency.blocks.items()}
    found = {
        "latency_ms": latency.median,
        "latency_mean_ms": latency.mean,
        "latency_std_ms": latency.std,
    }
    return found | ({"blocks_ms": blocks} if blocks else {})


def _percent(accuracy: Accuracy) -> dict[str, float | None]:
    return {name: None if accuracy is None else accuracy[name] for name in ("top1", "top5")}


def versions(*optional: str) -> dict[str, Any]:
    """Return what a result depends on beside its recipe: package versions and the commit.

    `optional` are installed packages that not every run uses.
    """
    names = ("torch", "timm", "lightning", "hydra-core", "torchmetrics", *optional)
    here = Path(__file__).parent
    commit = _git(here, "rev-parse", "HEAD")
    return {
        "vitrim": metadata.version("vitrim"),
        "versions": {
            "python": platform.python_version(),
            **{n: metadata.version(n) for n in names},
        },
        "commit": commit,
        "dirty": bool(_git(here, "status", "--porcelain")) if commit else None,
    }


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
