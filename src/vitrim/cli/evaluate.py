"""The command `vitrim-eval`: top-1 and top-5 of a finished run's network on any labelled images.

The data and trainer groups and their overrides are those of `vitrim`; images are prepared as the
run's own model wants them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrim.errors import ConfigError, VitrimError
from vitrim.files import write


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; what a user can mend ends in one message and exit code 1."""
    parser = argparse.ArgumentParser("vitrim-eval", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("choices", nargs="*", help="as for vitrim: data=NAME data.root=DIR ...")
    options = parser.parse_args(argv)
    try:
        path, result = evaluate(options.run, options.choices)
    except (VitrimError, OSError) as error:
        sys.exit(f"vitrim-eval: {error}")
    said = f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
    sys.stdout.write(
        f"{said} on {result['images']} images of {result['choices']['data']}: {path}\n"
    )


def evaluate(folder: Path, arguments: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Judge the network saved in `folder` and return the file with the result, and what it says.

    Raises:
        VitrimError: no finished run, damaged files, or choices that do not fit its network.
    """
    from vitrim.cli import checks
    from vitrim.cli.compose import chosen
    from vitrim.files import digest
    from vitrim.store import load
    from vitrim.trainer.classify import judge
    from vitrim.versions import versions

    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(
            f"{folder}: no recipe.yaml: expected the folder of a run, in which report.json is"
        )
    net, _ = load(folder)
    said, built = chosen("eval", arguments, folder / "recipe.yaml")
    data, model, where = built["data"], built["model"], f"data={said['choices']['data']}"
    if data is None:
        raise ConfigError(f"{where} has no images to judge by")
    if data.n_classes != model.n_classes:
        raise ConfigError(
            f"{where} has {data.n_classes} classes, the network in {folder} has {model.n_classes}"
        )
    share = said["trainer"]["limit_val_batches"]
    if type(share) is not float or share != 1:  # a whole 1 is one batch
        raise ConfigError(f"trainer.limit_val_batches={share}: every image counts: leave it at 1.0")
    loaders = data.module(model.spec())
    judged = {key: said[key] for key in ("data", "trainer", "seed")}
    name = said["name"] or f"{said['choices']['data']}-{digest(judged)}"
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ConfigError(f"name={name}: expected letters, digits, dots and dashes, of a file name")
    trainer = built["trainer"](
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=said["progress"],
    )
    result = {
        "format": 1,
        **judge(net, trainer, loaders, n_classes=data.n_classes),
        "images": len(loaders.val_dataloader().dataset),
        "network": checks.identity(str(folder)),
        "choices": said["choices"],
        **judged,
        **versions(),
    }
    (folder / "eval").mkdir(exist_ok=True)
    path = folder / "eval" / f"{name}.json"
    text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
    write(path, lambda file: file.write_text(text))
    return path, result
