"""From a command line to a configuration, and to what its groups build."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vitrim.cli import checks, guard
from vitrim.errors import ConfigError, VitrimError
from vitrim.files import PHASES, writable

if TYPE_CHECKING:
    from vitrim.budget.latency import Timing

_PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parents[1] / "conf") if path.is_dir())
GROUPS = ("model", "method", "data", "trainer")
TO_TIMM = ("model.args", "data.augmentation")
"""Keys below which stand arguments of timm's functions, those that conf/ does not name as well."""


def _build(cfg: DictConfig) -> dict[str, Any]:
    """Build what the four groups choose; all that is wrong with them is told at once."""
    said: Any = OmegaConf.to_container(cfg, resolve=False)
    built, wrong = _groups(cfg, GROUPS)
    problems = [*checks.of_run(said), *wrong]
    if not problems:
        built |= {"start": None, "timing": None}
        try:
            built["start"] = checks.start(
                said["from_run"], built["model"], transfer=cfg.transfer, seed=cfg.seed
            )
            if built["method"].budget.is_time:
                built["timing"] = cache(partial(_timing, cfg, built["model"]))
        except VitrimError as error:
            problems.append(str(error))
    if not problems:
        problems = checks.mismatches(said, built, {group: _choice(group) for group in GROUPS})
    if problems:
        raise ConfigError("\n".join(problems))
    return built


def _timing(cfg: DictConfig, model: Any) -> Timing:
    """Return how long parts of the dense network take on this device, measured once."""
    from vitrim.budget.latency import once

    shared = writable(Path(cfg.out).absolute() / PHASES)
    how = {key: cfg.latency[key] for key in ("batch", "repeats", "device")}
    return once(shared, model.build(fetch=False), model.description(), model.spec().size, **how)


def _groups(cfg: DictConfig, groups: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Build what these groups choose; return it by group, and what is wrong with the others."""
    built, problems = {}, []
    for group in groups:
        try:
            values = OmegaConf.to_container(cfg[group], resolve=True, throw_on_missing=True)
            guard.targets(values, group)
            built[group] = instantiate(values, _convert_="all")
        except (InstantiationException, OmegaConfBaseException, ConfigError) as error:
            problems.append(_reason(error, group))
    return built, problems


def chosen(
    config: str, arguments: Sequence[str], recipe: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compose conf/`config`.yaml for a command that judges the finished run of `recipe`.

    Return it as plain data, with the name of the data under `choices`, and what its groups data
    and trainer build, beside the model of that run.

    Raises:
        ConfigError: what is wrong with the choices.
    """
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = hydra.compose(config, overrides=[*arguments], return_hydra_config=True)
        choices = {group: cfg.hydra.runtime.choices[group] for group in ("data", "trainer")}
        with open_dict(cfg):
            del cfg.hydra
            cfg.model = OmegaConf.load(recipe).model
        said: Any = OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, arguments, config)) from None
    built, problems = _groups(cfg, ("data", "trainer", "model"))
    if problems:
        raise ConfigError("\n".join(problems))
    return {**said, "choices": choices}, built


def _choice(group: str) -> str | None:
    name: str | None = HydraConfig.get().runtime.choices.get(group)
    return name


def _reason(error: Exception, group: str) -> str:
    """Return the sentence that a user needs, out of Hydra's wrapping."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=???: expected a value, which has no default"
    text = str(error).split("\n    full_key:")[0].strip()
    return text if isinstance(error, VitrimError) else f"{group}: {text}"


def _explain(error: Exception, arguments: Sequence[str], config: str = "run") -> str:
    """Return the message of an error in composing or running, with the way out."""
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown is not None:
        full = str(getattr(error.__cause__, "full_key", None))
        key = full if full.startswith(f"{unknown[1]}.") else unknown[1]  # within a value {key: ...}
        parent, _, _ = key.rpartition(".")
        known = _known_keys(parent, arguments, config)
        ways = [f"expected one of {', '.join(known)}"] if known else []
        ways += [f"+{key}=... hands it to timm"] if parent in TO_TIMM else []
        return f"unknown key {key}: {'; '.join(ways)}"
    if "Config search path" in text:
        return text.split("Config search path")[0].strip()
    if isinstance(error, OSError) and error.filename is not None:
        return f"out: cannot write to {error.filename} ({error.strerror}); out=DIR moves it"
    return text


def _known_keys(parent: str, arguments: Sequence[str], config: str) -> list[str]:
    """Return the keys below `parent`, or below what there is of it, in what was asked for."""
    kinds = (*GROUPS, "experiment")
    groups = [arg for arg in arguments if arg.partition("=")[0] in kinds and "," not in arg]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose(config, overrides=groups)
    while parent and OmegaConf.select(cfg, parent) is None:
        parent = parent.rpartition(".")[0]
    return [str(key) for key in (OmegaConf.select(cfg, parent) if parent else cfg)]
