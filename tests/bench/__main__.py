"""Run the benchmarks and print their ratios: `python -m tests.bench [name ...]`."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from . import (
    attention,
    cut,
    export,
    gates,
    joint,
    large,
    listing,
    load,
    loader,
    lowrank,
    oneshot,
    overhead,
    resume,
    trials,
)
from .timing import table

BENCHMARKS = {
    "cut": cut,
    "gates": gates,
    "load": load,
    "attention": attention,
    "oneshot": oneshot,
    "joint": joint,
    "lowrank": lowrank,
    "trials": trials,
    "export": export,
    "resume": resume,
    "large": large,
    "listing": listing,
    "overhead": overhead,
    "loader": loader,
}


def main() -> None:
    """Run what the command line names, all by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="turns of the slowest benchmark; the quick ones take 3 to 5 times as many",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of torch; on a machine that others use, one thread gives the steadiest ratios",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=listing.IMAGES,
        help="files that listing makes and removes; 1280000: as many as ImageNet has",
    )
    args = parser.parse_args()
    listing.IMAGES = args.images
    unknown = sorted(set(args.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected names of {', '.join(BENCHMARKS)}")
    torch.set_num_threads(args.threads)
    console = Console()
    console.width = max(console.width, 132)  # where the output is no terminal
    rows = []
    for name in args.names or BENCHMARKS:
        with console.status(name):
            rows += BENCHMARKS[name].rows(args.repeats)
    title = f"ratios of {args.repeats} and more turns, torch threads: {args.threads}"
    console.print(table(rows, title))


if __name__ == "__main__":
    main()
