"""Methods from conf/method/NAME.yaml and keywords, as the command composes them, without Hydra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitrim.errors import ConfigError, VitrimError, shown

if TYPE_CHECKING:
    from vitrim.method import Method

_PACKAGE = Path(__file__).parents[1]
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parents[1] / "conf") if path.is_dir())
"""The folder of all numbers."""
Settings = dict[str, Any]
"""A configuration, or a part of it, as plain data."""
_REMOVES_NOTHING = "transfer"


def method_names() -> list[str]:
    """Return the names of the methods that compress, in alphabetical order."""
    names = (path.stem for path in (CONF / "method").glob("*.yaml"))
    return sorted(name for name in names if name != _REMOVES_NOTHING)


def build_method(
    name: str,
    changes: Mapping[str, object] | None = None,
    *,
    seed: int = 0,
    network: str = "",
    samples: int | None = None,
) -> Method:
    """Return the method of conf/method/`name`.yaml with some of its numbers changed.

    >>> build_method("vtp", {"gating.epochs": 3, "fine_tuning": {"epochs": 2}}).gating.epochs
    3

    Args:
        name: of the method, as in `method=` of the command.
        changes: keys of its yaml and their values, nested or dotted.
        seed: of what the method draws, `seed=` of the command.
        network: timm's name of the network, by which one-shot pruning chooses its table.
        samples: how many images there are, if fewer than the method asks for.

    Raises:
        ConfigError: there is no such method or key, or a value cannot work.
    """
    settings = method_settings(name, changes, seed=seed, network=network, samples=samples)
    return cast("Method", _instance(settings))


def method_settings(
    name: str,
    changes: Mapping[str, object] | None = None,
    *,
    seed: int = 0,
    network: str = "",
    samples: int | None = None,
) -> Settings:
    """Return what `build_method` builds from, with every interpolation resolved."""
    if name not in method_names():
        close = get_close_matches(name, method_names(), n=1)
        raise ConfigError(
            f"method={name!r}: expected one of {', '.join(method_names())}"
            f"{f'; did you mean {close[0]!r}?' if close else ''}"
        )
    known = _composed("method", name)
    settings = OmegaConf.merge(known, _checked(_nested(changes or {}), known, name, ""))
    around = {"seed": seed, "model": {"name": network}, "data": {"samples": samples}}
    root = OmegaConf.create({**around, "method": settings})
    try:
        return cast(Settings, OmegaConf.to_container(root, resolve=True)["method"])  # type: ignore[call-overload, index]
    except OmegaConfBaseException as error:
        raise ConfigError(f"method={name!r}: {error}") from None


def _composed(group: str, name: str) -> Settings:
    """Return conf/`group`/`name`.yaml merged with its list of defaults, not resolved."""
    content = cast(Settings, OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml")))
    merged: Any = OmegaConf.create({})
    for default in content.pop("defaults", ["_self_"]):
        other, _, package = default.partition("@")
        part = content if other == "_self_" else _composed(group, other)
        for key in reversed(package.split(".") if package else []):
            part = {key: part}
        merged = OmegaConf.merge(merged, part)
    return cast(Settings, OmegaConf.to_container(merged))


def _nested(changes: Mapping[str, object]) -> Settings:
    """Return changes with dotted keys as nested mappings."""
    merged: Any = OmegaConf.create({})
    for key, value in changes.items():
        part: object = _plain(value)
        for step in reversed(key.split(".")):
            part = {step: part}
        merged = OmegaConf.merge(merged, part)
    return cast(Settings, OmegaConf.to_container(merged))


def _plain(value: object) -> object:
    """Return a value of Python as yaml would have it."""
    match value:
        case Mapping():
            return _nested(value)
        case str() | None | bool() | int() | float():
            return value
        case Sequence() | set() | frozenset():
            return [_plain(item) for item in value]
    raise ConfigError(f"{value!r}: expected a number, a text, a list, a mapping or None")


def _checked(changes: Settings, known: Settings, method: str, where: str) -> Settings:
    """Return `changes`, whose keys are all known.

    Raises:
        ConfigError: naming the key and what is allowed.
    """
    for key, value in changes.items():
        name = f"{where}{key}"
        if key not in known or key == "_target_":
            raise ConfigError(_unknown(name, known, method, where))
        below = known[key]
        if isinstance(below, dict) and isinstance(value, dict):
            _checked(value, below, method, f"{name}.")
        elif isinstance(below, dict) and value is not None:
            keys = ", ".join(_public(below))
            raise ConfigError(f"{name}={shown(value)}: expected a mapping with keys of {keys}")
    return changes


def _unknown(name: str, known: Settings, method: str, where: str) -> str:
    keys = [*_public(known)]
    close = get_close_matches(name.removeprefix(where), keys, n=1)
    meant = f"; did you mean {where}{close[0]}?" if close else ""
    return f"unknown key {name} of method={method!r}{meant}: expected one of {', '.join(keys)}"


def _public(known: Iterable[str]) -> Iterator[str]:
    return (key for key in known if key != "_target_")


def _instance(node: object) -> object:
    """Return what a composed configuration describes: objects for the nodes with a `_target_`."""
    if isinstance(node, list):
        return [_instance(item) for item in node]
    if not isinstance(node, dict):
        return node
    arguments = {key: _instance(value) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    module, _, name = node["_target_"].rpartition(".")
    try:
        return getattr(import_module(module), name)(**arguments)
    except VitrimError:
        raise
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from None
