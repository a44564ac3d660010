"""The command `vitrim-eval`: top-1 and top-5 of a finished run's network on any labelled images.

The data and trainer groups and their overrides are those of `vitrim`; images are prepared as the
run's own model expects them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitrim.cli import guard
from vitrim.cli.arguments import folder_name, prepared, show_every_character, use_utf8
from vitrim.deploy.runfolder import RECIPE, read_recipe
from vitrim.errors import ConfigError, VitrimError, shortened
from vitrim.files import digest, escape, own_folder, write

if TYPE_CHECKING:
    from torch import nn

    from vitrim.data import Data


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error ends with one message and exit code 1, a bad flag with 2."""
    if argv is None:
        use_utf8("vitrim.cli.evaluate")
    show_every_character()
    guard.install()
    parser = argparse.ArgumentParser("vitrim-eval", description=__doc__)
    parser.add_argument("run", type=folder_name, help="the folder of a finished run")
    parser.add_argument("choices", nargs="*", help="as for vitrim: data=NAME data.root=DIR ...")
    options = parser.parse_args(argv)
    try:
        words = prepared(options.choices)
        path, result = evaluate(options.run, words)
    except (VitrimError, OSError, RecursionError) as error:
        sys.exit(f"vitrim-eval: {escape.lines(shortened(str(error)))}")
    accuracy = f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
    images = f"{result['images']} images of {result['choices']['data']}"
    if result["classes"] < result["outputs"]:
        images += f" ({result['classes']:,} of {result['outputs']:,} classes)"
    sys.stdout.write(f"{escape.terminal(f'{accuracy} on {images}: {path}')}\n")


def evaluate(folder: Path, arguments: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Evaluate the network saved in `folder`; return the file with the result, and the result.

    Raises:
        VitrimError: no finished run, damaged files, or choices that do not fit its network.
    """
    from vitrim.cli import checks
    from vitrim.data.outputs import n_present
    from vitrim.store import load
    from vitrim.versions import versions

    check_run(folder)
    chosen = evaluation(folder, arguments)
    net = load(folder)[0].float()  # the images are in float32
    path = folder / "eval" / f"{_name(chosen.config, chosen.settings)}.json"
    result = {
        "format": 1,
        **chosen.accuracy(net),
        "classes": n_present(chosen.data),
        "outputs": chosen.data.n_classes,
        "network": checks.network_digest(str(folder)),
        "choices": chosen.config["choices"],
        **chosen.settings,
        **versions(),
    }
    own_folder(path.parent)
    text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
    write(path, lambda file: file.write_text(text))
    return path, result


def check_run(folder: Path) -> None:
    """Refuse a folder that is not that of a run.

    Raises:
        VitrimError: naming the file that is missing, or malformed.
    """
    if not (folder / RECIPE).is_file():
        raise ConfigError(
            f"{folder}: no {RECIPE}: expected the folder of a run, in which report.json is"
        )
    read_recipe(folder)


class Evaluation(NamedTuple):
    """Images to evaluate a run's network on, and how.

    Args:
        folder: of the run.
        config: what was chosen, as plain data.
        built: the data set as it was chosen, the trainer and the model.
        data: the images with the network's outputs as labels.
    """

    folder: Path
    config: Mapping[str, Any]
    built: Mapping[str, Any]
    data: Data

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        return {key: self.config[key] for key in ("data", "trainer", "seed")}

    def accuracy(self, net: nn.Module) -> dict[str, float]:
        """Return top-1 and top-5 of `net` in percent, and the number of `images`."""
        from vitrim.cli.hardware import new_trainer
        from vitrim.trainer.classify import validate

        trainer = new_trainer(
            self.built["trainer"],
            default_root_dir=self.folder,
            enable_progress_bar=self.config["progress"],
        )
        loaders = self.data.module(self.built["model"].spec())
        return validate(net, trainer, loaders, n_classes=self.data.n_classes)


def evaluation(folder: Path, arguments: Sequence[str]) -> Evaluation:
    """Return what `arguments` choose for the network of the run in `folder`.

    Raises:
        VitrimError: choices that do not fit the network.
    """
    from vitrim.cli.compose import compose_for_run

    config, built = compose_for_run("eval", arguments, folder / RECIPE)
    return Evaluation(folder, config, built, _checked(folder, config, built))


def _checked(folder: Path, config: Mapping[str, Any], built: Mapping[str, Any]) -> Data:
    """Return the images, labelled as the network's outputs; refuse what cannot be evaluated on."""
    from vitrim.data import outputs
    from vitrim.deploy.runfolder import read_classes
    from vitrim.jobs.distributed import requested_processes

    n_outputs, where = built["model"].n_classes, f"data={config['choices']['data']}"
    if built["data"] is None:
        raise ConfigError(f"{where} has no images to evaluate on")
    processes = requested_processes(config["trainer"]) * config["trainer"].get("num_nodes", 1)
    if processes != 1:
        raise ConfigError(
            f"trainer.devices={config['trainer']['devices']}: an evaluation is one process: "
            "trainer.devices=1"
        )
    share = config["trainer"].get("limit_val_batches", 1.0)
    if type(share) is not float or share != 1:  # the integer 1 is one batch
        raise ConfigError(
            f"trainer.limit_val_batches={share}: every image counts: it must stay 1.0"
        )
    if config["trainer"].get("compile"):
        raise ConfigError("trainer.compile=true: an evaluation compiles nothing: set it to false")
    known, owner = read_classes(folder), f"the network in {folder}"
    images = outputs.evaluated(built["data"])
    data = outputs.for_network(images, n_outputs, known=known, loaded=True, owner=owner)
    if data.n_classes != n_outputs:
        raise ConfigError(f"{where} has {outputs.listed(data)}, {owner} has {n_outputs}")
    return data


def _name(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the name of the file with the result."""
    name: str = config["name"] or f"{config['choices']['data']}-{digest(settings)}"
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ConfigError(f"name={name}: expected letters, digits, dots and dashes, of a file name")
    return name
