"""What a configuration may make Hydra run: the list of it, and the checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from importlib import import_module
from inspect import isclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from vitrim.errors import ConfigError

FUNCTIONS = (
    "vitrim.data.none",
    "vitrim.data.cifar.cifar",
    "vitrim.data.torchvision_sets.torchvision_set",
    "vitrim.data.imagefolder.image_folder",
)
"""Functions that a `_target_` may name."""
CLASSES: Mapping[str, tuple[str, ...] | None] = {
    "lightning": ("Trainer",),
    "lightning.pytorch": ("Trainer",),
    "lightning.pytorch.callbacks": None,
    "lightning.pytorch.loggers": None,
    "lightning.pytorch.plugins": None,
    "lightning.pytorch.plugins.environments": None,
    "lightning.pytorch.strategies": None,
    "torch.optim": None,
    "torch.optim.lr_scheduler": None,
    "torchmetrics.classification": None,
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "FakeData", "Flowers102", "ImageFolder"),
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
PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
LOG_FILES = "${hydra.runtime.output_dir}/"
_MAX_YAML, _MAX_BRACKETS, _MAX_DEPTH = 2**16, 2000, 64
_PLAIN_TAGS = "tag:yaml.org,2002:"
_OWN = ("model", "method", "data")
"""Groups whose objects may come from a trusted package."""
_trusted: list[str] = []


def trust(package: str) -> None:
    """Let `_target_` name dataclasses of a further package, in every group but trainer.

    Python code and the command line decide on this; no configuration file can.
    """
    _trusted.append(f"{package}.")


def install() -> None:
    """Check every configuration that Hydra composes in this process, before Hydra acts on it.

    Hydra acts on its own part (callbacks, logging, launchers) before a job of ours begins, in
    every job of a sweep: loading a configuration is the one step that all of them pass. Only the
    commands call this, so that importing vitrim leaves Hydra as it is.
    """
    name = (  # Hydra 1.4 has a method of its own, by which all of it goes
        "_load_configuration"
        if "_load_configuration" in vars(ConfigLoaderImpl)
        else "load_configuration"
    )
    load = getattr(ConfigLoaderImpl, name)
    if not hasattr(load, "__wrapped__"):
        setattr(ConfigLoaderImpl, name, _checked(load))


def _checked(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Return Hydra's way to a configuration, which refuses those that it would run code for."""

    @wraps(load)
    def checked(loader: ConfigLoaderImpl, *args: object, **kwargs: object) -> DictConfig:
        for source in loader.get_sources():
            if source.provider == "command-line":
                check_files(Path(source.path))
        cfg = load(loader, *args, **kwargs)
        check_hydra(cast(dict[str, Any], OmegaConf.to_container(cfg.hydra, resolve=False)))
        return cfg

    return checked


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
    allowed = BUILT_BY.get(where, ()) + tuple(_trusted if where in _OWN else ())
    if allowed and not str(node.get("_target_")).startswith(allowed):
        raise ConfigError(
            f"{where}._target_={node.get('_target_')}: expected {' or '.join(allowed)}"
        )
    if "_target_" in node and not _is_allowed(node["_target_"]):
        raise ConfigError(
            f"{where}._target_={node['_target_']}: expected a dataclass where vitrim. defines it, "
            f"{', '.join(FUNCTIONS)}, or a class of {', '.join(CLASSES)}"
        )
    for key, value in node.items():
        check_targets(value, f"{where}.{key}")


def _is_allowed(target: object) -> bool:
    """Whether `target` names a builder by its own address: where it is defined, or exported."""
    if not isinstance(target, str) or "._" in target:
        return False
    module, _, name = target.rpartition(".")
    ours = f"{module}.".startswith(("vitrim.", *_trusted))
    if target in FUNCTIONS:
        return True
    if not ours and (module not in CLASSES or name not in (CLASSES[module] or (name,))):
        return False
    try:
        value = getattr(import_module(module), name, None)
    except ImportError:
        return False
    home = value.__module__ if isclass(value) else ""
    if ours:
        return home == module and is_dataclass(value)
    return home.partition(".")[0] == module.partition(".")[0]


def check_hydra(node: Mapping[str, Any]) -> None:
    """Refuse what Hydra itself would run for a configuration: its node is `node`, unresolved.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if node.get("callbacks"):
        raise ConfigError(f"hydra.callbacks={node['callbacks']}: must be empty")
    if node["job"]["env_set"]:
        raise ConfigError(
            f"hydra.job.env_set={node['job']['env_set']}: must be empty; set variables in the shell"
        )
    for plugin in ("launcher", "sweeper"):
        _check_plugin(node.get(plugin), f"hydra.{plugin}")
    for key, value in node.items():
        _refuse_calls(value, f"hydra.{key}", plugin=key in ("launcher", "sweeper"))
    for key in ("job_logging", "hydra_logging"):
        _check_logging(node.get(key), f"hydra.{key}")


def _check_plugin(node: object, where: str) -> None:
    target = node.get("_target_") if isinstance(node, dict) else node
    if not str(target).startswith(PLUGINS):
        raise ConfigError(f"{where}={target}: expected a plugin, of {' or '.join(PLUGINS)}")


def _refuse_calls(node: object, where: str, *, plugin: bool = False) -> None:
    """Refuse keys that make Hydra or Python's logging call something, `plugin` excepted."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            _refuse_calls(item, f"{where}.{index}")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == "()" or (key == "_target_" and not plugin):
            raise ConfigError(f"{where}.{key}={value}: callables are not allowed here")
        _refuse_calls(value, f"{where}.{key}")


def _check_logging(node: object, where: str) -> None:
    """Refuse handlers and formatters that are not plain, and files outside a run's folder."""
    if isinstance(node, str) and "${" in node and not node.startswith(LOG_FILES):
        raise ConfigError(f"{where}={node}: interpolations are not allowed here")
    if isinstance(node, list):
        for index, item in enumerate(node):
            _check_logging(item, f"{where}.{index}")
    if not isinstance(node, dict):
        return
    if "class" in node and node["class"] not in HANDLERS:
        raise ConfigError(f"{where}.class={node['class']}: expected one of {', '.join(HANDLERS)}")
    file = node.get("filename", LOG_FILES)
    if not str(file).startswith(LOG_FILES) or ".." in str(file):
        raise ConfigError(f"{where}.filename={file}: expected one below {LOG_FILES}")
    for key, value in node.items():
        _check_logging(value, f"{where}.{key}")


def check_files(folder: Path) -> None:
    """Refuse yaml files that are not plain data, or too large with all aliases written out.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    for path in sorted(folder.rglob("*.yaml")):
        with path.open("rb") as file:
            content = file.read(_MAX_YAML + 1)
        try:
            if len(content) > _MAX_YAML or not _is_small(content):
                raise ConfigError(
                    f"{path}: expected up to {_MAX_YAML:,} bytes, values with all aliases written "
                    f"out, and {_MAX_DEPTH} levels"
                )
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not plain yaml: {error}") from None


def _is_small(content: bytes) -> bool:
    """Whether the values in a yaml file stay few once its aliases are written out."""
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    if content.count(b"[") + content.count(b"{") > _MAX_BRACKETS:  # parsing takes quadratic time
        return False
    for event in yaml.parse(content, Loader=yaml.CSafeLoader):
        tag = getattr(event, "tag", None)
        if tag is not None and (not tag.startswith(_PLAIN_TAGS) or "python" in tag):
            raise yaml.YAMLError(f"the tag {tag} can run code")
        match event:
            case yaml.CollectionStartEvent():
                open_nodes.append((event.anchor, 1))
                continue
            case yaml.CollectionEndEvent():
                anchor, size = open_nodes.pop()
                sizes[anchor] = size
            case yaml.AliasEvent():
                size = sizes.get(event.anchor, _MAX_YAML)  # endless if it contains itself
            case yaml.ScalarEvent():
                size = sizes[event.anchor] = 1
            case _:
                continue
        anchor, size_before = open_nodes[-1]
        open_nodes[-1] = (anchor, size_before + size)
        if size_before + size > _MAX_YAML or len(open_nodes) > _MAX_DEPTH:
            return False
    return True
