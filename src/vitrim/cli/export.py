"""The command `vitrim-export`: a finished run in the format of other programs.

int8_static calibrates and evaluates on images, which are chosen as for vitrim-eval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrim.cli.arguments import (
    add_plugins,
    count_of,
    folder_name,
    import_plugins,
    show_every_character,
    use_utf8,
)
from vitrim.deploy import export as module
from vitrim.deploy.export import FILES, PRECISIONS, check_precision, export
from vitrim.errors import ConfigError, VitrimError
from vitrim.files import escape

if TYPE_CHECKING:
    from vitrim.deploy.static_int8 import Images


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error ends with one line on stderr and exit code 1, a bad flag with 2."""
    if argv is None:
        use_utf8("vitrim.cli.export")
    show_every_character()
    options = _parser().parse_intermixed_args(argv)
    try:
        import_plugins(options.plugins)
        path, error = export(
            options.run,
            options.format,
            out=options.out,
            precision=options.precision,
            image_size=options.image_size,
            images=_images(options),
        )
    except (VitrimError, OSError) as failure:
        message = _explain(failure, options.out or options.run)
        print(f"vitrim-export: {escape.terminal(message)}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{options.format}: {error}")
    print(escape.terminal(path), flush=True)


def _images(options: argparse.Namespace) -> Images | None:
    """Return what int8_static calibrates and evaluates on; None for other precisions.

    Raises:
        ConfigError: images for another precision, or none for this one.
    """
    check_precision(options.format, options.precision)
    is_static = options.precision == "int8_static"
    if not is_static and options.choices:
        raise ConfigError(
            f"{' '.join(options.choices)}: only --precision int8_static looks at images"
        )
    if not is_static:
        return None
    if options.image_size is not None:
        raise ConfigError("--image-size: int8_static takes images of the run's size")
    if not any(word.startswith("data=") for word in options.choices):
        raise ConfigError(
            "--precision int8_static calibrates on training images and evaluates on others: add "
            "data=NAME, as for vitrim-eval"
        )
    from vitrim.cli.calibration import images_for

    named = [f"plugins=[{','.join(options.plugins)}]"] if options.plugins else []
    return images_for(options.run, [*named, *options.choices], options.calibration_images)


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
    add("choices", nargs="*", help="of int8_static: data=NAME data.root=DIR ... as for vitrim-eval")
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
    add(
        "--precision",
        choices=PRECISIONS,
        default="f32",
        help="of openvino; int8_static also of onnx (default: f32)",
    )
    add(
        "--calibration-images",
        type=count_of,
        default=300,
        metavar="N",
        help="training images that int8_static is calibrated on (default: 300)",
    )
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images (default: the run's); for networks that take any size",
    )
    add_plugins(parser)
    return parser
