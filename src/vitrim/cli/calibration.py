"""The images of a static int8 export: chosen as for `vitrim-eval`, training images to calibrate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrim.cli import guard
from vitrim.cli.arguments import prepared
from vitrim.cli.evaluate import Evaluation, check_run, evaluation
from vitrim.deploy.static_int8 import Images
from vitrim.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def images_for(run: Path, choices: Sequence[str], n_images: int) -> Images:
    """Return the first `n_images` of a seeded draw of training images, and how to evaluate.

    Raises:
        VitrimError: no run, choices that do not fit its network, or no training images.
    """
    guard.install()
    check_run(run)
    chosen = evaluation(run, prepared(choices))
    if not chosen.built["data"].trainable:
        raise ConfigError(
            f"data.root={chosen.config['data'].get('root')}: no training split: int8_static needs "
            "training images to calibrate on"
        )
    return Images(
        calibration=_images(chosen, n_images),
        evaluate=chosen.accuracy,
        facts={"choices": chosen.config["choices"], **chosen.settings},
    )


def _images(chosen: Evaluation, n_images: int) -> Iterator[Tensor]:
    loaders = chosen.built["data"].module(chosen.built["model"].spec())
    for images, _ in loaders.calibration_dataloader(n_images, chosen.config["seed"]):
        yield images
