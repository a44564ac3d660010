"""Show on a GPU what is to be shown there: `python -m tests.gpu [part ...] [--tiny]`."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from vitrim.measure import tf32

from . import latency, planning, synthetic, training
from .scale import FULL, TINY, Finding, Scale

PARTS = {
    "training": (training, "VTP's gates on DeiT-B, batch 256: images/s, timm's loop, profile"),
    "latency": (latency, "DeiT-B in bf16 at 60 % of the MACs, batch 1 and 64, eager and graphs"),
    "planning": (planning, "one-shot pruning of DeiT-B: calibration, planning, cutting"),
    "synthetic": (synthetic, "DC-ViT's Table 9, row DeiT-B: synthetic images and a trial"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line names, all by default, where there is a GPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny network on the CPU")
    asked = parser.parse_args(arguments)
    unknown = sorted({*asked.parts} - {*PARTS})
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected names of {', '.join(PARTS)}")
    console = Console()
    console.width = max(console.width, 132)
    if not asked.tiny and not torch.cuda.is_available():
        console.print("There is no GPU. On one this would run, meant for less than 8 minutes:")
        for name in asked.parts or PARTS:
            console.print(f"  {name}: {PARTS[name][1]}")
        return
    _run(console, TINY if asked.tiny else FULL, asked.parts or [*PARTS])


def _run(console: Console, scale: Scale, names: Sequence[str]) -> None:
    """Run parts one after another; a part that fails does not end the others."""
    where = "the CPU" if scale.device == "cpu" else torch.cuda.get_device_name()
    started = time.perf_counter()
    failed = []
    for name in names:
        gc.collect()
        if scale.device != "cpu":
            torch.cuda.empty_cache()
        table = Table("what", "value", "goal", "met", title=name)
        began = time.perf_counter()
        try:
            for finding in PARTS[name][0].findings(scale):
                table.add_row(*_cells(finding))
        except Exception as error:  # the minutes of a lent GPU are few: the other parts run
            reason = str(error).partition("\n")[0]
            table.add_row("failed", f"{type(error).__name__}: {reason}"[:100])
            failed.append(name)
        console.print(table)
        console.print(f"{name}: {time.perf_counter() - began:.1f} s")
    spent = time.perf_counter() - started
    fp32 = "" if scale.device == "cpu" else f", TF32 {tf32()} of fp32"
    console.print(f"{scale.name} on {where}{fp32}, torch {torch.__version__}: {spent:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _cells(finding: Finding) -> tuple[str, str, str, str]:
    met = {None: "", True: "yes", False: "NO"}[finding.met]
    return finding.what, finding.value, finding.goal, met


if __name__ == "__main__":
    main()
