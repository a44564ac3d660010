"""A method under the contract test: its yaml, found by itself, and how to keep runs short."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from command import QUICK
from vitrim.cli import guard
from vitrim.cli.compose import CONF
from vitrim.method import Method

PACKAGE = os.environ.get("VITRIM_CONTRACT_PACKAGE")
"""Folder of a package with methods of its own and conf/method/*.yaml: they are tested instead."""
_FOLDER = Path(PACKAGE) / "conf" if PACKAGE else CONF
if PACKAGE:
    sys.path.insert(0, str(Path(PACKAGE).parent))
    guard.trust(Path(PACKAGE).name)

NAMES = sorted(
    path.stem for path in (_FOLDER / "method").rglob("*.yaml") if path.parent.name != "base"
)
IMAGES = 256
"""Images of a sample for statistics: four batches of the digits."""


@dataclass(frozen=True)
class Subject:
    """A method under test."""

    name: str
    method: Method
    short: tuple[str, ...]
    """Overrides that make every phase one epoch or one iteration long, or of few images."""

    @property
    def arguments(self) -> list[str]:
        """The words of a command that choose the method and keep everything short."""
        where = ["--config-dir", str(_FOLDER)] if PACKAGE else []
        return [*where, f"method={self.name}", *QUICK, *self.short]


def subject(name: str) -> Subject:
    """Compose a method's yaml with the defaults of conf/run.yaml and build it."""
    GlobalHydra.instance().clear()
    overrides = [f"method={name}"]
    if PACKAGE:
        overrides.append(f"hydra.searchpath=[file://{_FOLDER}]")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=overrides)
    values = OmegaConf.to_container(cfg.method, resolve=True)
    method = instantiate(values, _convert_="all")
    return Subject(name, method, tuple(_shortened(cfg.method, "method")))


def _shortened(node: DictConfig, where: str) -> Iterator[str]:
    """Iterate over the words that set what says below `node` how long something takes."""
    for name, value in node.items():
        if OmegaConf.is_interpolation(node, name):
            continue  # of another group, which has its own overrides
        if OmegaConf.is_dict(value):
            yield from _shortened(value, f"{where}.{name}")
        elif name in ("epochs", "iterations"):
            yield f"{where}.{name}=1"
        elif where.endswith(".sampling") and name == "images":
            yield f"{where}.{name}={IMAGES}"
