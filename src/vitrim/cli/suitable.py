"""Which methods can compress a network, for the message where the chosen one cannot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vitrim.errors import VitrimError

if TYPE_CHECKING:
    from vitrim.budget.cost import Cost
    from vitrim.method import Method
    from vitrim.model.source import Timm

_OWN = ("method", "experiment", "strength", "target", "hydra", "from_run", "out")
"""Keys that the other methods do not take over from the command line."""


def hint(cost: Cost, model: Timm, chosen: str | None) -> str:
    """Return which methods can compress the network; empty if the chosen one can.

    Args:
        cost: of the network.
        model: the source of the network.
        chosen: the name of the chosen method.
    """
    suitable = _suitable_methods(cost, model)
    if not suitable or chosen in suitable:
        return ""
    return f"; methods that can compress model.name={model.name}: {', '.join(suitable)}"


def _suitable_methods(cost: Cost, model: Timm) -> list[str]:
    """Return the methods in conf/method, as they stand there, that can cut this network."""
    hydra_config = HydraConfig.get()
    sources = hydra_config.runtime.config_sources
    conf = next((source.path for source in sources if source.provider == "main"), None)
    if conf is None:
        return []
    words = [
        word
        for word in hydra_config.overrides.task
        if word.lstrip("+~").partition("=")[0].split(".")[0].split("@")[0] not in _OWN
    ]
    names = sorted(path.stem for path in Path(conf, "method").glob("*.yaml"))
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=conf):
        return [name for name in names if _can_cut(conf, (*words, f"method={name}"), cost, model)]


@cache  # the jobs of a sweep in one process ask for the same ones
def _composed(conf: str, words: tuple[str, ...]) -> DictConfig:
    """Return the method that `words` choose from the configuration folder `conf`."""
    method: DictConfig = hydra.compose("run", [*words]).method
    return method


def _can_cut(conf: str, words: tuple[str, ...], cost: Cost, model: Timm) -> bool:
    """Whether the method that `words` choose can cut a network at its first strength."""
    from vitrim.method import can_compress

    try:
        method: Method = instantiate(_composed(conf, words), _convert_="all")
    except (VitrimError, HydraException, InstantiationException, OmegaConfBaseException):
        return False
    return can_compress(method, cost, model.skeleton())
