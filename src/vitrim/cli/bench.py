"""The command `vitrim-bench`: latency of saved networks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vitrim.deploy.bench import bench, show
from vitrim.deploy.engine import ENGINES, Setting
from vitrim.errors import ConfigError, VitrimError


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
