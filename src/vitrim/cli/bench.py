"""The command `vitrim-bench`: latency and memory of a run's dense and compact network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence

import torch

from vitrim.cli.arguments import (
    add_plugins,
    count_of,
    folder_name,
    import_plugins,
    show_every_character,
    use_utf8,
)
from vitrim.deploy.bench import bench, show
from vitrim.deploy.engine import ENGINES, Setting
from vitrim.errors import ConfigError, VitrimError
from vitrim.files import escape
from vitrim.network.head_runs import ARRANGEMENTS
from vitrim.network.timing import PRECISIONS


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error ends with one message and exit code 1, a bad flag with 2."""
    if argv is None:
        use_utf8("vitrim.cli.bench")
    show_every_character()
    options = _parser().parse_args(argv)
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        import_plugins(options.plugins)
        settings = _settings(options)
        for folder in options.runs:
            show(bench(folder, settings, repeats=options.repeats, heads=options.heads))
    except (VitrimError, OSError) as error:
        sys.exit(f"vitrim-bench: {escape.lines(error)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vitrim-bench", description=__doc__)
    add, engines, precisions = parser.add_argument, ",".join(ENGINES), ",".join(PRECISIONS)
    add("runs", nargs="+", type=folder_name, metavar="RUN", help="folders of finished runs")
    add("--batch", type=_counts, default=[1], help="images in a pass: 1,16 (default: 1)")
    add(
        "--precision",
        type=_some_of(PRECISIONS),
        default=["fp32"],
        help=f"some of {precisions} (default: fp32; onnxruntime: fp32 only)",
    )
    add(
        "--engine",
        type=_some_of(ENGINES),
        default=["eager"],
        help=f"some of {engines} (default: eager)",
    )
    add("--threads", type=count_of, help="of PyTorch and the other engines (default: PyTorch's)")
    add("--repeats", type=count_of, default=20, help="timed passes of each network (default: 20)")
    add(
        "--heads",
        choices=(*ARRANGEMENTS, "fastest"),
        default="runs",
        help="how heads of several widths are run; fastest measures it (default: runs)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (default: cpu)")
    add_plugins(parser)
    return parser


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers from 1 on, as in 1,16")
    return [int(word) for word in words]


def _some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return the type of a flag that takes some of these words, separated by commas."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if not {*words} <= {*known}:
            raise argparse.ArgumentTypeError(f"{text}: expected some of {','.join(known)}")
        return words

    return parse


def _settings(options: argparse.Namespace) -> list[Setting]:
    """Return every combination that was asked for, without those that an engine cannot run."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU: choose --device cpu")
    settings = [
        Setting(engine=engine, precision=precision, batch=batch, device=options.device)
        for engine in options.engine
        for precision in options.precision
        for batch in options.batch
    ]
    possible = [one for one in settings if (one.engine, one.precision) != ("onnxruntime", "bf16")]
    if not possible:
        raise ConfigError("--precision bf16: onnxruntime has none on CPU; choose another engine")
    return possible
