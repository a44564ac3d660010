"""The command `vitrim-export`: a finished run in the format of other programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vitrim.deploy.export import FILES, PRECISIONS, export
from vitrim.errors import VitrimError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with 1 and one line."""
        self.exit(1, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `vitrim-export` command; exit with 1 and one line on stderr where it cannot."""
    options = _parser().parse_args(argv)
    try:
        path, said = export(
            options.run,
            options.to,
            out=options.out,
            precision=options.precision,
            image_size=options.image_size,
        )
    except (VitrimError, OSError) as error:
        print(f"vitrim-export: {_explain(error, options.out or options.run)}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{options.to}: {said}")
    print(path, flush=True)


def _explain(error: Exception, folder: Path) -> str:
    """Return the message of an error, with the way out."""
    if isinstance(error, VitrimError):
        return " ".join(str(error).split())
    return f"cannot write below {folder} ({error}): --out DIR writes elsewhere"


def _parser() -> argparse.ArgumentParser:
    summary, _, layout = (__doc__ or "").partition("\n\n")
    layout = layout.partition("\n\n")[0]
    parser = _Parser(
        "vitrim-export",
        description=f"{summary}\n\n{layout}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a finished run (plan.json is in it)")
    add("--to", required=True, choices=FILES, help="the format")
    add("--out", type=Path, metavar="DIR", help="the folder to write (default: RUN/export/FORMAT)")
    add("--precision", choices=PRECISIONS, default="f32", help="of openvino (default: f32)")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images (default: the run's); for networks that take any size",
    )
    return parser
