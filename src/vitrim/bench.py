"""The command `vitrim-bench`: the dense and the compact network of a run side by side.

Both are in one process and take turns, so that drift of the machine's speed hits both alike. The
dense one is rebuilt from the plan, with random weights: they do not matter for time. Times are
medians with the quartiles around them; a ratio is the median over the turns' own ratios.
Memory is what `vitrim.engine` says.
"""

from __future__ import annotations

import argparse
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

from vitrim.atomic import write
from vitrim.engine import ENGINES, Setting, prepared
from vitrim.errors import ConfigError, VitrimError
from vitrim.measure import InputSize, count, image_shape, in_turns, versions
from vitrim.model import structure
from vitrim.plan import Plan
from vitrim.store import load


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; what a user can mend ends in one message and exit code 1."""
    options = _parser().parse_args(argv)
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        settings = _settings(options)
        for folder in options.runs:
            show(bench(folder, settings, repeats=options.repeats))
    except (VitrimError, OSError) as error:
        sys.exit(f"vitrim-bench: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vitrim-bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    add("--batch", default="1", help="images in a pass: 1,16 (default: 1)")
    add("--precision", default="fp32", help="fp32, bf16 (default: fp32; onnxruntime: fp32 only)")
    add("--engine", default="eager", help=f"any of {','.join(ENGINES)} (default: eager)")
    add("--threads", type=_positive, help="of PyTorch and the other engines (default: PyTorch's)")
    add("--repeats", type=_positive, default=20, help="timed passes of each network (default: 20)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 on")
    return int(text)


def _settings(options: argparse.Namespace) -> list[Setting]:
    """Return every combination asked for, those left out that an engine cannot run."""
    if options.device not in ("cpu", "cuda") or (
        options.device == "cuda" and not torch.cuda.is_available()
    ):
        raise ConfigError(f"--device {options.device}: expected cpu, or cuda where there is a GPU")
    batches = options.batch.split(",")
    if not all(batch.isdecimal() for batch in batches):
        raise ConfigError(f"--batch {options.batch}: expected whole numbers from 1 on, as in 1,16")
    settings = [
        Setting(engine=engine, precision=precision, batch=int(batch), device=options.device)
        for engine in options.engine.split(",")
        for precision in options.precision.split(",")
        for batch in batches
    ]
    possible = [one for one in settings if (one.engine, one.precision) != ("onnxruntime", "bf16")]
    if not possible:
        raise ConfigError("--precision bf16: onnxruntime has none on CPU; choose another engine")
    return possible


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


if __name__ == "__main__":
    main()
