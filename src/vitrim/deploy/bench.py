"""The command `vitrim-bench`: the dense and the compact network of a run side by side.

Both are in one process and take turns, so that drift of the machine's speed hits both alike. The
dense one is rebuilt from the plan, with random weights: they do not matter for time. Times are
medians with the quartiles around them; a ratio is the median over the turns' own ratios.
Memory is what `vitrim.deploy.engine` says.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from timm.data import resolve_model_data_config
from torch import nn

from vitrim.deploy.engine import Setting, prepared
from vitrim.files import write
from vitrim.measure import InputSize, count, image_shape, in_turns
from vitrim.network import structure
from vitrim.plan import Plan
from vitrim.store import load
from vitrim.versions import versions


def bench(folder: Path, settings: Sequence[Setting], *, repeats: int) -> dict[str, Any]:
    """Time both networks of a run in every setting, write bench.json into `folder`, return it.

    Raises:
        VitrimError: no complete folder of a run, or an engine that cannot run its network.
    """
    compact, plan = load(folder)
    dense: nn.Module = timm.create_model(plan.model["name"], **plan.model["args"]).eval()
    size = _size(folder, plan, dense)
    counts = [count(net, size) for net in (dense, compact)]
    found: dict[str, Any] = {
        "format": 1,
        "run": str(folder),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "macs_ratio": counts[1].macs / counts[0].macs,
        "advice": advice(compact),
        "rows": [_row(setting, (dense, compact), size, repeats) for setting in settings],
        **versions(),
    }
    text = json.dumps(found, indent=1, sort_keys=True, allow_nan=False)
    write(folder / "bench.json", lambda path: path.write_text(text))
    return found


def _size(folder: Path, plan: Plan, net: nn.Module) -> InputSize:
    """Return the size of a run's images: its recipe's, its plan's, or the one that timm knows."""
    recipe = folder / "recipe.yaml"
    said = yaml.safe_load(recipe.read_text())["model"] if recipe.is_file() else {}
    side: InputSize | None = said.get("image_size") or plan.model["args"].get("img_size")
    known: Sequence[int] = resolve_model_data_config(net)["input_size"][1:]
    return known if side is None else side


def advice(net: nn.Module) -> list[str]:
    """Return what about the widths of a compact network costs time, one sentence each."""
    described = structure(net)
    odd = [s.name for s in described.sites.values() if any(dim % 2 for dim in s.head_dims)]
    uneven = [s.name for s in described.sites.values() if len(set(s.head_dims)) > 1]
    ragged = [s.name for s in described.sites.values() if s.name.endswith(".hidden") and s.size % 8]
    said = (
        (odd, "head widths that are odd: cut with method.round_to=8"),
        (uneven, "heads of unequal width: cut with method.even_heads=true"),
        (ragged, "hidden widths that are no multiples of 8: cut with method.round_to=8"),
    )
    return [f"{len(names)} sites ({names[0]}, ...) have {text}" for names, text in said if names]


def _row(
    setting: Setting, nets: Sequence[nn.Module], size: InputSize, repeats: int
) -> dict[str, Any]:
    """Return the line of the table for one setting: both networks' times, memory and ratio."""
    shape = image_shape(nets[0], size)
    x = torch.randn(setting.batch, *shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        built = [prepared(net, x, setting, Path(scratch) / str(i)) for i, net in enumerate(nets)]
        times = in_turns([call for call, _ in built], repeats)
    ratios = [after / before for before, after in zip(*times, strict=True)]
    sides = [
        {**_quartiles(seen), "memory_mb": memory}
        for seen, (_, memory) in zip(times, built, strict=True)
    ]
    return {
        **{name: getattr(setting, name) for name in ("engine", "precision", "batch", "device")},
        **dict(zip(("dense", "compact"), sides, strict=True)),
        "latency_ratio": statistics.median(ratios),
    }


def _quartiles(seen: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(seen, [0.25, 0.5, 0.75]).tolist()
    return {"low_ms": low, "median_ms": median, "high_ms": high}


def show(found: Mapping[str, Any]) -> None:
    """Print the table of a run's bench.json."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 140
    console = Console(width=width, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{found['run']}: {found['threads']} threads, {found['repeats']} repeats")
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for name in _HEAD:
        grid.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for row in found["rows"]:
        grid.add_row(*_cells(row, found["macs_ratio"]))
    console.print(grid)
    for line in found["advice"]:
        console.print(f"advice: {line}")


_HEAD = (
    *("engine", "precision", "batch", "dense ms", "compact ms"),
    *("ratio", "MACs", "ratio/MACs", "dense MB", "compact MB"),
)


def _cells(row: Mapping[str, Any], macs_ratio: float) -> list[str]:
    sides = [row["dense"], row["compact"]]
    times = [f"{s['median_ms']:.2f} [{s['low_ms']:.2f}, {s['high_ms']:.2f}]" for s in sides]
    ratio = row["latency_ratio"]
    return [
        *(str(row[name]) for name in ("engine", "precision", "batch")),
        *times,
        *(f"{value:.3f}" for value in (ratio, macs_ratio, ratio / macs_ratio)),
        *("-" if s["memory_mb"] is None else f"{s['memory_mb']:.1f}" for s in sides),
    ]
