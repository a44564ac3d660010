"""The command `vitrim-prepare`: a copy of an image folder with the images resized once.

IMAGES has SPLIT/CLASS/IMAGE, as data=imagefolder expects; OUT gets the same names. Images that
cannot be decoded, or are named after another class, are left out and listed in OUT/prepared.json.
Stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from vitrim.cli.arguments import folder_name, show_every_character, use_utf8
from vitrim.errors import VitrimError
from vitrim.files import escape


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error ends with one message and exit code 1, a bad flag with 2."""
    if argv is None:
        use_utf8("vitrim.cli.prepare")
    show_every_character()
    options = _parser().parse_args(argv)
    try:
        _prepare(options)
    except (VitrimError, OSError) as error:
        sys.exit(f"vitrim-prepare: {escape.lines(str(error))}")
    except KeyboardInterrupt:
        sys.exit("vitrim-prepare: stopped; the same command goes on")
    facts = json.loads((options.out / _manifest()).read_text("utf-8"))
    numbers = {split: sum(kinds.values()) for split, kinds in facts["images"].items()}
    counted = ", ".join(f"{number:,} in {split}" for split, number in numbers.items())
    left_out = f"; left out: {len(facts['left_out']):,}" if facts["left_out"] else ""
    sys.stdout.write(escape.terminal(f"images: {counted}{left_out}") + "\n")
    sys.stdout.write(escape.terminal(str(options.out / _manifest())) + "\n")


def _manifest() -> str:
    from vitrim.data.prepare import MANIFEST

    return MANIFEST


def _prepare(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from vitrim.data.loading import cores
    from vitrim.data.prepare import Resizing, prepare

    resizing = Resizing(short=options.short, quality=options.quality)
    workers = cores() if options.workers is None else options.workers
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=options.quiet) as progress:
        task = progress.add_task("images", total=None)
        steps = prepare(options.images, options.out, resizing, workers=workers)
        for done, total in steps:
            progress.update(task, completed=done, total=total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vitrim-prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", type=folder_name, metavar="IMAGES", help="the folder of the images")
    add("out", type=folder_name, metavar="OUT", help="the folder to write")
    add("--short", type=int, default=256, metavar="N", help="pixels of the short side (256)")
    add("--quality", type=int, default=95, metavar="Q", help="of JPEGs, 1 to 100 (95)")
    add("--workers", type=int, metavar="N", help="processes (default: the cores of this one)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser
