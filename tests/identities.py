"""Identities of runs that do not take place, and small image files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

from vitrim.cli.compose import CONF, register_resolvers
from vitrim.cli.identity import contents_of, identity_of
from vitrim.cli.recipe import Contents
from vitrim.cli.teacher import teacher_of
from vitrim.pipeline import Identity


class Identified(NamedTuple):
    """What a command would run, and where."""

    cfg: DictConfig
    identity: Identity
    folder: Path
    contents: Contents


def composed(*words: str) -> DictConfig:
    """Return the configuration of a command, whose choices Hydra knows from now on."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[*words], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg.hydra
    return cfg


def identified(*words: str) -> Identified:
    """Return the identity of the run of a command, without checking that it can run."""
    return identified_of(composed(*words))


def identified_of(cfg: DictConfig) -> Identified:
    """Return the identity of the run of a configuration that was composed last."""
    parts: dict[str, Any] = {
        group: instantiate(OmegaConf.to_container(cfg[group], resolve=True), _convert_="all")
        for group in ("model", "method", "data")
    }
    job: Any = SimpleNamespace(
        **parts,
        out=Path(cfg.out).absolute(),
        quantize=(),
        retrains=False,
        start=None,
        teacher=teacher_of(cfg),
    )
    contents = contents_of(cfg, job)
    return Identified(cfg, *identity_of(cfg, job, contents), contents)


def write_images(root: Path, *, train: int = 6, val: int = 3, classes: int = 2) -> Path:
    """Write images of 8x8 pixels to ROOT/train/<class> and ROOT/val/<class>; return ROOT."""
    for split, number in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(number):
                color = (40 * index % 256, 200 * label % 256, 90)
                Image.new("RGB", (8, 8), color).save(folder / f"{index}.png")
    return root
