"""The command `vitrim-export`: a finished run in the format of other programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vitrim import escape
from vitrim.cli.arguments import folder_name, show_every_character, use_utf8
from vitrim.deploy import export as module
from vitrim.deploy.export import FILES, PRECISIONS, export
from vitrim.errors import VitrimError


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error ends with one line on stderr and exit code 1, a bad flag with 2."""
    if argv is None:
        use_utf8("vitrim.cli.export")
    show_every_character()
    options = _parser().parse_args(argv)
    try:
        path, error = export(
            options.run,
            options.format,
            out=options.out,
            precision=options.precision,
            image_size=options.image_size,
        )
    except (VitrimError, OSError) as failure:
        message = _explain(failure, options.out or options.run)
        print(f"vitrim-export: {escape.terminal(message)}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{options.format}: {error}")
    print(escape.terminal(path), flush=True)


def _explain(error: Exception, folder: Path) -> str:
    """Return the message of an error in one line, with the way out."""
    if isinstance(error, VitrimError):
        return " ".join(str(error).split())
    return f"cannot write below {folder} ({error}): --out DIR writes elsewhere"


def _parser() -> argparse.ArgumentParser:
    _, formats, _ = (module.__doc__ or "").split("\n\n", 2)
    parser = argparse.ArgumentParser(
        "vitrim-export",
        description=f"{__doc__}\n\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "run",
        type=folder_name,
        metavar="RUN",
        help="the folder of a finished run (plan.json is in it)",
    )
    add(
        *("--format", "--to"),
        required=True,
        choices=FILES,
        help="what to write; --to is the former name",
    )
    add(
        "--out",
        type=folder_name,
        metavar="DIR",
        help="the folder to write (default: RUN/export/FORMAT)",
    )
    add("--precision", choices=PRECISIONS, default="f32", help="of openvino (default: f32)")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images (default: the run's); for networks that take any size",
    )
    return parser
