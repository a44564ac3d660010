"""What a configuration may make Hydra run: the list of it, and the checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import wraps
from importlib import import_module
from inspect import isclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitrim.cli import config_files, loaded
from vitrim.cli.hydra_settings import check_hydra, check_out, check_output
from vitrim.cli.interpolations import check_size, references
from vitrim.errors import ConfigError, VitrimError, missing_package, shown

FUNCTIONS = (
    "vitrim.data.none",
    "vitrim.data.cifar.cifar",
    "vitrim.data.torchvision_sets.torchvision_set",
    "vitrim.data.imagefolder.image_folder",
    "vitrim.data.huggingface.huggingface_set",
    "vitrim.data.webdataset.webdataset_shards",
)
"""Functions that a `_target_` may name."""
CLASSES: Mapping[str, tuple[str, ...] | None] = {
    "lightning": ("Trainer",),
    "lightning.pytorch": ("Trainer",),
    "lightning.pytorch.callbacks": (
        "DeviceStatsMonitor",
        "LearningRateMonitor",
        "RichModelSummary",
    ),
    "lightning.pytorch.plugins": None,
    "lightning.pytorch.plugins.environments": None,
    "lightning.pytorch.strategies": None,
    "torch.optim": None,
    "torch.optim.lr_scheduler": None,
    "torchmetrics.classification": None,
    "torchvision.transforms": None,
    "torchvision.transforms.v2": None,
}
"""Modules, with the classes there that a `_target_` may name; None: all of their own package."""
BUILT_BY = {
    "model": ("vitrim.model.",),
    "method": ("vitrim.method.",),
    "data": ("vitrim.data.",),
    "trainer": ("lightning.Trainer", "lightning.pytorch.Trainer"),
}
"""What the `_target_` of a group begins with."""
NO_OUTPUT = "eval"
"""The configuration of a command in which Hydra writes nothing, whatever its settings are."""
Loaded = ConfigResult | None
"""What Hydra reads from a file, if there is one."""
_WAY_IN = "; plugins=[PACKAGE] on the command line allows classes of a package of your own"
_LIGHTNING = ("LightningDataModule", "Callback")
"""Classes of Lightning from which a class of a trusted package may derive."""
_OWN = ("model", "method", "data")
"""Groups whose objects may come from a trusted package."""
_trusted: list[str] = []
_named: list[str] = []
"""Trusted packages: by Python code, and by the command line of this run."""


def trust(package: str) -> None:
    """Let `_target_` name dataclasses of a further package, in every group but trainer.

    Python code and the command line decide on this; no configuration file can.
    """
    _trusted.append(f"{package}.")


def trust_named(packages: Sequence[str]) -> None:
    """Let `_target_` name classes of exactly these packages, beside those that are trusted.

    They may be dataclasses, LightningDataModules and Callbacks.
    """
    _named[:] = [f"{package}." for package in packages]


def named() -> list[str]:
    """Return the packages that the command line of this run names."""
    return [package.removesuffix(".") for package in _named]


def install() -> None:
    """Check every configuration that Hydra composes in this process, before Hydra acts on it.

    Hydra acts on its own part (callbacks, logging, launchers) before a job of ours begins, in
    every job of a sweep: reading files and loading a configuration are steps that all of them
    pass. Only the commands call this, so that importing vitrim leaves Hydra as it is.
    """
    name = (  # Hydra 1.4 has a method of its own, by which all of it goes
        "_load_configuration"
        if "_load_configuration" in vars(ConfigLoaderImpl)
        else "load_configuration"
    )
    wrap(ConfigRepository, "initialize_sources", _with_checked_sources)
    wrap(ConfigRepository, "load_config", _with_checked_file)
    wrap(ConfigLoaderImpl, "_load_single_config", _with_checked_content)
    wrap(ConfigLoaderImpl, name, _with_checked_result)
    wrap(Hydra, "get_mode", _without_composing)


def wrap(owner: type, name: str, wrapper: Callable[[Callable[..., Any]], object]) -> None:
    """Replace a method of Hydra's by what `wrapper` makes of it, once in a process."""
    method = getattr(owner, name)
    if not hasattr(method, "__wrapped__"):
        setattr(owner, name, wrapper(method))


def _with_checked_sources(initialize: Callable[..., None]) -> Callable[..., None]:
    """Return Hydra's way to the places of configurations, which refuses packages of others."""

    @wraps(initialize)
    def checked(repository: ConfigRepository, search_path: ConfigSearchPath) -> None:
        config_files.check_sources([str(entry.path) for entry in search_path.get_path()])
        initialize(repository, search_path)

    return checked


def _with_checked_file(load: Callable[..., Loaded]) -> Callable[..., Loaded]:
    """Return Hydra's way to a file, which refuses one that is not plain data."""

    @wraps(load)
    def checked(repository: ConfigRepository, config_path: str) -> Loaded:
        source = repository._find_object_source(config_path, ObjectType.CONFIG)
        key = loaded.version(source, config_path)
        if source is None or source.scheme() != "file":
            return loaded.once(key, lambda: load(repository, config_path))
        file = Path(source.path, source._normalize_file_name(config_path))
        if not config_files.is_own(file):
            config_files.check_file(file, Path(source.path))
        try:
            return loaded.once(key, lambda: load(repository, config_path))
        except (yaml.YAMLError, OmegaConfBaseException, OSError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{file}: not a plain configuration: {reason}") from None

    return checked


def _with_checked_content(load: Callable[..., ConfigResult]) -> Callable[..., ConfigResult]:
    """Return Hydra's way to the content of a file in its package, which refuses what acts."""

    @wraps(load)
    def checked(loader: ConfigLoaderImpl, default: ResultDefault, **more: object) -> ConfigResult:
        result = load(loader, default=default, **more)
        scheme, _, folder = result.path.partition("://")
        file = Path(folder, f"{default.config_path}.yaml")
        if scheme == "file" and not config_files.is_own(file):
            plain = cast(dict[str, Any], OmegaConf.to_container(result.config, resolve=False))
            plain.pop("defaults", None)
            config_files.check_content(file, plain)
        return result

    return checked


def _with_checked_result(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Return Hydra's way to a configuration, which refuses those that it would run code for."""

    @wraps(load)
    def checked(loader: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        for word in kwargs.get("overrides", args[1] if len(args) > 1 else ()):
            _check_word(word)
        try:
            cfg = load(loader, *args, **kwargs)
        except KeyError as error:  # of hydra.job.env_copy
            raise ConfigError(f"{error}: no such variable or key") from None
        plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
        check_hydra(plain["hydra"])
        if plain["hydra"]["job"]["config_name"] != NO_OUTPUT:
            check_output(plain["hydra"])
            check_out(plain.get("out", ""))
        check_size(plain)
        return cfg

    return checked


def _without_composing(get_mode: Callable[..., RunMode | None]) -> Callable[..., RunMode | None]:
    """Return Hydra's way to the mode of a command, which composes only where it may be set.

    A word may set it, and a file of others. None of vitrim's own does, and Hydra would compose
    every run twice.
    """

    @wraps(get_mode)
    def known(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
        keys = [word.partition("=")[0].strip("+~ ") for word in overrides]
        setting = [
            word
            for key, word in zip(keys, overrides, strict=True)
            if key == "hydra" or key.startswith("hydra.mode")
        ]
        if setting == ["hydra.mode=RUN"]:  # of a job of a sweep
            return RunMode.RUN
        places = [str(entry.path) for entry in hydra.config_loader.get_search_path().get_path()]
        others = any(key.startswith("hydra.searchpath") for key in keys) or any(
            not path.startswith(("pkg://", "structured://")) and not _is_conf(path)
            for path in places
        )
        return get_mode(hydra, config_name, overrides) if setting or others else None

    return known


def _is_conf(place: str) -> bool:
    """Whether a place of configurations is vitrim's own conf/."""
    return config_files.is_own(Path(place.removeprefix("file://")))


def _check_word(word: str) -> None:
    """Refuse an argument of the command line with an interpolation that reads elsewhere."""
    if "${" in word:
        try:
            references(word.partition("=")[2])
        except VitrimError as error:
            raise ConfigError(f"{word}: {error}") from None


def check_targets(node: object, where: str) -> None:
    """Refuse a `_target_` that is not on the list: configs must not be able to run any code.

    Args:
        node: a part of the configuration with its interpolations resolved.
        where: its key.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{where}={node}: an interpolation is not resolved here")
    if isinstance(node, list):
        for index, item in enumerate(node):
            check_targets(item, f"{where}.{index}")
    if not isinstance(node, dict):
        return
    allowed = BUILT_BY.get(where, ()) + tuple((*_trusted, *_named) if where in _OWN else ())
    if allowed and not str(node.get("_target_")).startswith(allowed):
        raise ConfigError(
            f"{where}._target_={shown(node.get('_target_'))}: expected {' or '.join(allowed)}"
            f"{_WAY_IN if where in _OWN else ''}"
        )
    if "_target_" in node and not _is_allowed(node["_target_"]):
        raise ConfigError(
            f"{where}._target_={shown(node['_target_'])}: {_why_not(node['_target_'])}"
        )
    for key, value in node.items():
        check_targets(value, f"{where}.{key}")


def _is_allowed(target: object) -> bool:
    """Whether `target` names a builder by its own address: where it is defined, or exported."""
    if not isinstance(target, str) or "._" in target:
        return False
    module, _, name = target.rpartition(".")
    ours = f"{module}.".startswith(("vitrim.", *_trusted, *_named))
    if target in FUNCTIONS:
        return True
    if not ours and (module not in CLASSES or name not in (CLASSES[module] or (name,))):
        return False
    try:
        value = getattr(import_module(module), name, None)
    except ImportError as error:
        if missing := missing_package(error):
            raise missing from None
        return False
    home = value.__module__ if isclass(value) else ""
    if ours:
        own = is_dataclass(value) or f"{module}.".startswith((*_trusted, *_named))
        return home == module and own and _is_data(value)
    return home.partition(".")[0] == module.partition(".")[0]


def _is_data(value: object) -> bool:
    """Whether a class is a dataclass, a LightningDataModule or a Callback."""
    bases = value.__mro__ if isclass(value) else ()
    return is_dataclass(value) or any(base.__name__ in _LIGHTNING for base in bases)


def _why_not(target: object) -> str:
    """Return why an address is not allowed, and what is."""
    module, _, name = str(target).rpartition(".")
    if not f"{module}.".startswith((*_trusted, *_named)):
        return (
            f"expected a dataclass where vitrim. defines it, {', '.join(FUNCTIONS)}, or a class of "
            f"{', '.join(CLASSES)}{_WAY_IN}"
        )
    try:
        value = getattr(import_module(module), name)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    except AttributeError:
        return f"{module} has no {name}"
    home = value.__module__ if isclass(value) else module
    if home != module:
        return f"expected {home}.{name}, where it is defined"
    return f"expected a dataclass or a {' or '.join(_LIGHTNING)}"
