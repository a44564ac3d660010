"""Settings of Hydra that must not be changed, not even on the command line: those that act."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vitrim.errors import ConfigError, shown

PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
SAMPLER = "hydra.sweeper.sampler"
"""Where a sweeper of Optuna has the class of its sampler, one of Optuna's own."""
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
LOG_FILES = "${hydra.runtime.output_dir}/"
FOLDERS: Mapping[str, str | None] = {
    "run.dir": "${out}",
    "sweep.dir": "${out}",
    "sweep.subdir": ".",
    "output_subdir": None,
}
"""Where Hydra writes in the command `vitrim`: out=DIR moves the runs, and nothing else is kept."""


def check_hydra(node: Mapping[str, Any]) -> None:
    """Refuse what Hydra itself would run or write for a configuration.

    Args:
        node: its part `hydra`, not resolved; parts may be missing.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if node.get("callbacks"):
        raise ConfigError(f"hydra.callbacks={node['callbacks']}: must be empty")
    _check_job(_part(node, "job"))
    for plugin in ("launcher", "sweeper"):
        if plugin in node:
            _check_plugin(node[plugin], f"hydra.{plugin}")
    for key, value in node.items():
        _refuse_calls(value, f"hydra.{key}", plugin=key in ("launcher", "sweeper"))
    _check_search_space(_part(node, "sweeper"))
    for key in ("job_logging", "hydra_logging"):
        _check_logging(node.get(key), f"hydra.{key}")
    _check_runtime(node)


def _part(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = node.get(key)
    return part if isinstance(part, dict) else {}


def _check_job(job: Mapping[str, Any]) -> None:
    """Refuse other variables of the environment, and a name that leads to another folder."""
    if job.get("env_copy"):
        raise ConfigError(f"hydra.job.env_copy={job['env_copy']}: must be empty")
    if job.get("env_set"):
        names = ", ".join(map(str, job["env_set"]))
        raise ConfigError(f"hydra.job.env_set={names}: must be empty; set variables in the shell")
    if not re.fullmatch(r"\?\?\?|[\w-][\w.-]*", str(job.get("name", "vitrim"))):
        raise ConfigError(f"hydra.job.name={job['name']}: expected letters, digits and dashes")


def check_output(node: Mapping[str, Any]) -> None:
    """Refuse folders of Hydra's own output other than those of conf/run.yaml.

    Args:
        node: the part `hydra` of a configuration of the command `vitrim`, not resolved.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    for name, expected in FOLDERS.items():
        part, _, key = name.rpartition(".")
        value = _part(node, part).get(key, "???") if part else node.get(key)
        if value != expected:
            raise ConfigError(
                f"hydra.{name}={value}: expected {shown(expected)}: Hydra writes nothing itself, "
                "out=DIR moves the runs, and recipe.yaml has the configuration"
            )


def check_out(out: object) -> None:
    """Refuse a root of the run folders that is no name: Hydra would make a folder of its text.

    Raises:
        ConfigError: naming the value.
    """
    if not isinstance(out, str) or not out.strip() or "\0" in out:
        raise ConfigError(f"out={shown(out)}: expected the name of a folder")


def _check_runtime(node: Mapping[str, Any]) -> None:
    """Refuse a folder of Hydra's output set in another way, and loggers that are no names."""
    if _part(node, "runtime").get("output_dir", "???") != "???":
        raise ConfigError("hydra.runtime.output_dir: Hydra sets it; out=DIR moves the runs")
    verbose = node.get("verbose", False)
    names = verbose if isinstance(verbose, list) else [verbose]
    if not all(isinstance(name, bool | str) for name in names):
        raise ConfigError(f"hydra.verbose={verbose}: expected true, false or names of loggers")


def _check_search_space(sweeper: Mapping[str, Any]) -> None:
    """Refuse what a sweeper would import by its name."""
    if sweeper.get("custom_search_space") is not None:
        raise ConfigError(
            f"hydra.sweeper.custom_search_space={sweeper['custom_search_space']}: must be null, a "
            "function would be called: choose values by hydra.sweeper.params"
        )


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
        samples = where == SAMPLER and re.fullmatch(r"optuna\.samplers\.\w+Sampler", str(value))
        if key == "()" or (key == "_target_" and not (plugin or samples)):
            raise ConfigError(f"{where}.{key}={value}: callables are not allowed here")
        _refuse_calls(value, f"{where}.{key}")


def _check_logging(node: object, where: str) -> None:
    """Refuse handlers and formatters that are not plain, and files outside a run's folder."""
    if isinstance(node, str):
        _check_log_text(node, where)
    if isinstance(node, list):
        for index, item in enumerate(node):
            _check_logging(item, f"{where}.{index}")
    if not isinstance(node, dict):
        return
    if "." in node:
        raise ConfigError(f"{where}..={node['.']}: attributes are not allowed here")
    if "class" in node and node["class"] not in HANDLERS:
        raise ConfigError(f"{where}.class={node['class']}: expected one of {', '.join(HANDLERS)}")
    file = str(node.get("filename", LOG_FILES))
    name = file.removeprefix(LOG_FILES).replace("${hydra.job.name}", "")
    if not file.startswith(LOG_FILES) or ".." in name or not re.fullmatch(r"[\w.-]*", name):
        raise ConfigError(f"{where}.filename={file}: expected one below {LOG_FILES}")
    for key, value in node.items():
        _check_logging(value, f"{where}.{key}")


def _check_log_text(text: str, where: str) -> None:
    """Refuse interpolations, and the prefixes by which logging imports objects."""
    if "${" in text and not text.startswith(LOG_FILES):
        raise ConfigError(f"{where}={text}: interpolations are not allowed here")
    if "://" in text and text not in STREAMS:
        raise ConfigError(f"{where}={text}: expected plain text, or one of {', '.join(STREAMS)}")
