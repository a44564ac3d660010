"""Latency and memory of the dense and the compact network of a run, in the engines of `engine`.

Both networks are in one process and their passes are interleaved, so that a drift of the machine's
speed affects both alike. The dense one is rebuilt from the plan with random weights: they do not
change its latency. Times are medians with their quartiles; a ratio is the median of the ratios of
pairs of passes. `vitrim.deploy.engine` says how memory is measured.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from vitrim.deploy.engine import Setting, prepare
from vitrim.deploy.runfolder import read_recipe
from vitrim.deploy.table import terminal_table
from vitrim.files import escape, write
from vitrim.measure import InputSize, count, image_shape, tf32
from vitrim.network import structure
from vitrim.network.head_runs import ARRANGEMENTS, Arrangement, arranged
from vitrim.network.timing import Heads, clock_of, interleaved_times, quickest
from vitrim.plan import Plan
from vitrim.store import load
from vitrim.versions import versions

FEW = 5
"""Passes that decide how heads are run."""


class Side(TypedDict):
    """What was measured of one network; memory is None where it cannot be measured."""

    low_ms: float
    median_ms: float
    high_ms: float
    memory_mb: float | None


class BenchRow(TypedDict):
    """Both networks in one setting."""

    engine: str
    precision: str
    batch: int
    device: str
    heads: Arrangement
    dense: Side
    compact: Side
    latency_ratio: float


class Benchmark(TypedDict):
    """The content of bench.json, but for the versions; `tf32` is None on CPU."""

    format: int
    run: str
    machine: str
    threads: int
    tf32: str | None
    repeats: int
    macs_ratio: float
    advice: list[str]
    rows: list[BenchRow]


def bench(
    folder: Path, settings: Sequence[Setting], *, repeats: int, heads: Heads = "runs"
) -> Benchmark:
    """Time both networks of a run in every setting, write bench.json into `folder`, return it.

    Args:
        folder: of the run.
        settings: the lines of the table.
        repeats: timed passes of each network.
        heads: how those of the compact network are run (`vitrim.network.head_runs`); `fastest`: as
            is fastest in a measurement of `FEW` passes before, in each setting.

    Raises:
        VitrimError: no complete folder of a run, or an engine that cannot run its network.
    """
    compact, plan = load(folder)
    compact.float()
    dense: nn.Module = timm.create_model(plan.model["name"], **plan.model["args"]).eval()
    size = _image_size(folder, plan, dense)
    counts = [count(net, size) for net in (dense, compact)]
    result: Benchmark = {
        "format": 1,
        "run": str(folder),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "tf32": tf32() if any(one.device != "cpu" for one in settings) else None,
        "repeats": repeats,
        "macs_ratio": counts[1].macs / counts[0].macs,
        "advice": advice(compact),
        "rows": [_row(one, dense, compact, size, repeats, heads) for one in settings],
    }
    text = json.dumps({**result, **versions()}, indent=1, sort_keys=True, allow_nan=False)
    write(folder / "bench.json", lambda path: path.write_text(text))
    return result


def _image_size(folder: Path, plan: Plan, net: nn.Module) -> InputSize:
    """Return the size of a run's images: its recipe's, its plan's, or the one that timm knows."""
    model = read_recipe(folder).get("model", {})
    side: InputSize | None = model.get("image_size") or plan.model["args"].get("img_size")
    known: Sequence[int] = resolve_model_data_config(net)["input_size"][1:]
    return known if side is None else side


def advice(net: nn.Module) -> list[str]:
    """Return which widths of a compact network cost latency, one sentence a reason."""
    described = structure(net)
    odd = [s.name for s in described.sites.values() if any(dim % 2 for dim in s.head_dims)]
    uneven = [s.name for s in described.sites.values() if len(set(s.head_dims)) > 1]
    ragged = [s.name for s in described.sites.values() if s.kind == "hidden" and s.size % 8]
    reasons = (
        (odd, "head widths that are odd: cut with method.round_to=8"),
        (uneven, "heads of unequal width: cut with method.even_heads=true, or try --heads fastest"),
        (ragged, "hidden widths that are no multiples of 8: cut with method.round_to=8"),
    )
    return [f"{len(names)} sites ({names[0]}, ...) have {text}" for names, text in reasons if names]


def _row(
    setting: Setting,
    dense: nn.Module,
    compact: nn.Module,
    size: InputSize,
    repeats: int,
    heads: Heads,
) -> BenchRow:
    """Return times, memory and ratio of both networks in one setting."""
    x = torch.randn(
        setting.batch, *image_shape(dense, size), generator=torch.Generator().manual_seed(0)
    )
    clock = clock_of(setting.device)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        how = _fastest(setting, compact, x, Path(scratch)) if heads == "fastest" else heads
        with arranged(compact, how):
            passes = [
                prepare(net, x, setting, Path(scratch) / name)
                for name, net in (("dense", dense), ("compact", compact))
            ]
        times = interleaved_times([call for call, _ in passes], repeats, clock=clock)
    ratios = [after / before for before, after in zip(*times, strict=True)]
    sides = [_side(ms, memory) for ms, (_, memory) in zip(times, passes, strict=True)]
    return {
        "engine": setting.engine,
        "precision": setting.precision,
        "batch": setting.batch,
        "device": setting.device,
        "heads": how,
        "dense": sides[0],
        "compact": sides[1],
        "latency_ratio": statistics.median(ratios),
    }


def _fastest(setting: Setting, net: nn.Module, x: Tensor, scratch: Path) -> Arrangement:
    """Return the arrangement of heads that is fastest in a setting."""
    calls = []
    for how in ARRANGEMENTS:
        with arranged(net, how):
            calls.append(prepare(net, x, setting, scratch / how)[0])
    return quickest(interleaved_times(calls, FEW, clock=clock_of(setting.device)))


def _side(milliseconds: Sequence[float], memory_mb: float | None) -> Side:
    low, median, high = np.quantile(milliseconds, [0.25, 0.5, 0.75]).tolist()
    return {"low_ms": low, "median_ms": median, "high_ms": high, "memory_mb": memory_mb}


def show(result: Benchmark) -> None:
    """Print the table of a run's bench.json."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    console = Console(width=width, markup=False, highlight=False, emoji=False, soft_wrap=True)
    title = f"{result['run']}: {result['threads']} threads, {result['repeats']} repeats"
    title += "" if result["tf32"] is None else f", TF32 {result['tf32']}"
    console.print(escape.terminal(title))
    rows = [_cells(row, result["macs_ratio"]) for row in result["rows"]]
    console.print(terminal_table([_HEAD, *rows], left=1))
    for line in result["advice"]:
        console.print(escape.terminal(f"advice: {line}"))


_HEAD = (
    *("engine", "precision", "batch", "heads", "dense ms", "compact ms"),
    *("ratio", "MACs", "ratio/MACs", "dense MB", "compact MB"),
)


def _cells(row: BenchRow, macs_ratio: float) -> list[str]:
    sides = [row["dense"], row["compact"]]
    times = [f"{s['median_ms']:.2f} [{s['low_ms']:.2f}, {s['high_ms']:.2f}]" for s in sides]
    ratio = row["latency_ratio"]
    return [
        *(row["engine"], row["precision"], str(row["batch"]), row["heads"]),
        *times,
        *(f"{value:.3f}" for value in (ratio, macs_ratio, ratio / macs_ratio)),
        *("-" if s["memory_mb"] is None else f"{s['memory_mb']:.1f}" for s in sides),
    ]
