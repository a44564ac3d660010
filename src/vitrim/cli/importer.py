"""The command `vitrim-import`: weights of another library, as a folder of vitrim.

FILE is a .safetensors, .pth, .pt, .bin, .ckpt or .pth.tar file, AugReg's .npz, or a folder of timm
or of transformers. No code in it is run. The folder that is written holds the dense network as
vitrim.load, model.checkpoint= and timm.create_model("local-dir:FOLDER", pretrained=True) read it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrim.cli.arguments import folder_name, show_every_character, use_utf8
from vitrim.errors import VitrimError, shown
from vitrim.files import escape
from vitrim.model.layout import NAMES

if TYPE_CHECKING:
    from vitrim.model.importing import Imported


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error ends with one line on stderr and exit code 1, a bad flag with 2."""
    if argv is None:
        use_utf8("vitrim.cli.importer")
    show_every_character()
    options = _parser().parse_args(argv)
    from vitrim.model.importing import import_weights

    out = options.out or Path("imported") / options.file.name.partition(".")[0]
    try:
        found = import_weights(
            str(options.file),
            out,
            layout=options.format,
            name=options.model,
            weights=options.weights,
        )
    except (VitrimError, OSError) as error:
        message = " ".join(str(error).split()).removeprefix("model.checkpoint=")
        print(f"vitrim-import: {escape.terminal(message)}", file=sys.stderr)
        raise SystemExit(1) from None
    print(escape.terminal(f"vitrim {' '.join(map(shlex.quote, words(found)))}"))
    print(escape.terminal(found.folder), flush=True)


def words(found: Imported) -> list[str]:
    """Return the words with which the command `vitrim` compresses an imported network."""
    args = found.model["args"]
    assert isinstance(args, Mapping)
    named = {"num_classes": "num_classes", "img_size": "image_size"}
    keys = [
        f"model.{named[key]}={shown(value)}"
        if key in named
        else f"+model.args.{key}={shown(value)}"
        for key, value in args.items()
    ]
    name = f"model.name={found.model['name']}"
    return ["model=timm", name, *keys, f"model.checkpoint={found.folder}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "vitrim-import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", type=folder_name, metavar="FILE", help="a file or a folder of weights")
    add("--format", choices=NAMES, help="the layout of its keys (default: found)")
    add("--model", metavar="NAME", help="timm's name of the network (default: found)")
    add("--weights", metavar="WHICH", help="of several: model, ema, or a name (default: model)")
    add(
        "--out",
        type=folder_name,
        metavar="DIR",
        help="the folder to write (default: imported/NAME of the file)",
    )
    return parser
