"""What a configuration file of others may contain: values for a run, and nothing that acts.

A file is trusted if it lies in vitrim's own conf/. All others are checked when Hydra reads them,
by whatever way they came (`experiment=`, `--config-dir`, `--config-path`, `--config-name`,
`hydra.searchpath`, a list of defaults), and again with the package that they are put into.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml

from vitrim.api.settings import CONF as CONF
from vitrim.cli.hydra_settings import check_hydra
from vitrim.cli.interpolations import references
from vitrim.errors import ConfigError
from vitrim.files import YamlError, read_yaml

SCHEMES = ("file", "structured")
HYDRA_PACKAGES = ("pkg://hydra.conf", "pkg://hydra_plugins.")
"""Packages with configurations: Hydra's own, and its plugins'."""
LAUNCHER = (
    "account",
    "array_parallelism",
    "constraint",
    "cpus_per_gpu",
    "cpus_per_task",
    "exclude",
    "gpus_per_node",
    "gpus_per_task",
    "gres",
    "max_num_timeout",
    "mem_gb",
    "mem_per_cpu",
    "mem_per_gpu",
    "nodes",
    "partition",
    "qos",
    "signal_delay_s",
    "stderr_to_stdout",
    "tasks_per_node",
    "timeout_min",
)
"""Settings of a launcher that are no commands and no folders."""
_PLUGINS = ("launcher", "sweeper")
_PARAMETER = re.compile(r"[A-Za-z_][\w./-]*")
_NOT_SWEPT = ("hydra", "plugins", "out", "sweep", "data.download")
"""What the keys begin with over which a file must not sweep."""
_WORD = re.compile(r"[^\s$`\\'\"]*")


def check_sources(paths: list[str]) -> None:
    """Refuse places of configurations whose reading would import code, or that do not exist.

    Raises:
        ConfigError: naming the place.
    """
    for path in paths:
        scheme, found, folder = path.partition("://")
        if path.startswith(HYDRA_PACKAGES) or (found and scheme == "structured"):
            continue
        if found and scheme not in SCHEMES:
            raise ConfigError(f"hydra.searchpath: {path}: expected a folder, as in file:///FOLDER")
        if not Path(folder if found else path).is_dir():
            raise ConfigError(f"hydra.searchpath: {path}: no such folder")


def check_file(file: Path, folder: Path) -> None:
    """Check a file of others that Hydra is about to read from `folder`.

    Raises:
        ConfigError: it lies elsewhere, is not plain data, is too large, or chooses what acts.
    """
    if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder)):
        raise ConfigError(f"{file}: not below {folder}: --config-dir FOLDER reads from FOLDER")
    try:
        content = read_yaml(file)
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if content is None:
        return
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys and values")
    check_defaults(file, content.get("defaults"))
    if "hydra" in content:
        check_content(file, {"hydra": content["hydra"]})


def check_defaults(file: Path, defaults: object) -> None:
    """Refuse a list of defaults that chooses parts of Hydra, or whose names are computed.

    Raises:
        ConfigError: naming the entry.
    """
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        for word in _words(entry):
            text = re.sub(r"^(override |optional )+", "", word.strip())
            group, _, package = text.partition("@")
            own = word == "override hydra/job_logging" and "stdout" in _words(entry)
            acts = f"{group.lstrip('/')}/".startswith("hydra/") or "hydra" in package
            if acts and not own:
                raise ConfigError(
                    f"{file}: defaults: {word}: a file must not choose parts of Hydra: choose "
                    "them on the command line"
                )
            if ":" in text and "${" in text:
                raise ConfigError(f"{file}: defaults: {word}: expected a name")


def _words(entry: object) -> list[str]:
    if isinstance(entry, dict):
        return [str(part) for pair in entry.items() for item in pair for part in _words(item)]
    if isinstance(entry, list):
        return [part for item in entry for part in _words(item)]
    return [] if entry is None else [str(entry)]


def check_content(file: Path, content: dict[str, object]) -> None:
    """Refuse what acts in the content of a file of others.

    Args:
        file: its name, for messages.
        content: its values, in the package where they end up, not resolved.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    hydra = content.get("hydra")
    if isinstance(hydra, dict):
        rest = _without_sweep(file, hydra)
        content = {**{key: v for key, v in content.items() if key != "hydra"}, **rest}
        check_hydra({key: value for key, value in hydra.items() if key not in _PLUGINS})
    for key, value in leaves(content):
        where = f"{key}={_short(value)}"
        if key.split(".")[0] == "hydra":
            _check_setting(file, key, value)
        elif key.split(".")[0] == "out" and not _is_below(value):
            raise ConfigError(
                f"{file}: {where}: a file may only name a folder below the current one: out=DIR on "
                "the command line"
            )
        elif key.split(".")[0] == "plugins" and value != []:
            raise ConfigError(
                f"{file}: {where}: a file must not name plugins, whose code is run: "
                "plugins=[PACKAGE] on the command line"
            )
        elif key == "data.download" and value is not False:
            raise ConfigError(f"{file}: {where}: only the command line starts a download")
        elif isinstance(value, str) and "${" in value:
            try:
                keys = references(value)
            except (ConfigError, YamlError) as error:
                raise ConfigError(f"{file}: {where}: {error}") from None
            if any(name.lstrip(".").split(".")[0] == "hydra" for name in keys):
                raise ConfigError(f"{file}: {where}: settings of Hydra are not read by a file")


def _without_sweep(file: Path, hydra: dict[str, object]) -> dict[str, object]:
    """Return a content of settings of Hydra, without those of a sweep that a file may have.

    They are `hydra.mode` and `hydra.sweeper.params`, whose values become words of the command line
    of a job: they must not be what a file may not set.
    """
    rest = {key: value for key, value in hydra.items() if key != "mode"}
    mode, sweeper = hydra.get("mode", "RUN"), hydra.get("sweeper")
    if mode not in ("RUN", "MULTIRUN"):
        raise ConfigError(f"{file}: hydra.mode={_short(mode)}: expected RUN or MULTIRUN")
    if not isinstance(sweeper, dict) or "params" not in sweeper:
        return {"hydra": rest} if rest else {}
    params = sweeper["params"] or {}
    if not isinstance(params, dict):
        raise ConfigError(
            f"{file}: hydra.sweeper.params={_short(params)}: expected keys and values"
        )
    for key, value in params.items():
        where = f"{file}: hydra.sweeper.params.{key}={_short(value)}"
        if not _PARAMETER.fullmatch(str(key)) or str(key).startswith(_NOT_SWEPT):
            raise ConfigError(f"{where}: a file must not sweep over this key")
        if not isinstance(value, str | int | float) or "${" in str(value):
            raise ConfigError(f"{where}: expected values separated by commas, as in 0,1,2")
    rest["sweeper"] = {key: value for key, value in sweeper.items() if key != "params"}
    return {"hydra": rest} if (rest := {k: v for k, v in rest.items() if v != {}}) else {}


def _check_setting(file: Path, key: str, value: object) -> None:
    """Refuse a setting of Hydra that neither conf/ has nor is a launcher's number or word."""
    if (key, value) in _own_settings():
        return
    _, _, name = key.partition("hydra.launcher.")
    plain = value is None or isinstance(value, int | float)
    if name in LAUNCHER and (plain or (isinstance(value, str) and _WORD.fullmatch(value))):
        return
    raise ConfigError(
        f"{file}: {key}={_short(value)}: a file must not set this, which Hydra acts on: set it on "
        "the command line"
    )


@cache
def _own_settings() -> list[tuple[str, object]]:
    """Return the settings of Hydra in vitrim's own files, as keys and values."""
    run = yaml.safe_load((CONF / "run.yaml").read_text(encoding="utf-8"))["hydra"]
    slurm = yaml.safe_load((CONF / "hydra/launcher/slurm.yaml").read_text(encoding="utf-8"))
    del slurm["defaults"]
    return [*leaves({"hydra": {**run, "launcher": slurm}})]


def leaves(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Iterate over the values of nested plain data that contain no others, by dotted key."""
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and node:
        for index, child in enumerate(node):
            yield from leaves(child, f"{key}.{index}")
    else:
        yield key, node


def is_own(file: Path) -> bool:
    """Whether a file lies in vitrim's own conf/."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(CONF))


def _is_below(folder: object) -> bool:
    """Whether `folder` is a name of a folder below the current one."""
    if not isinstance(folder, str) or "${" in folder or folder.startswith("~"):
        return folder is None
    return not Path(folder).is_absolute() and ".." not in Path(folder).parts


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
