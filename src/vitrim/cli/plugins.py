"""Packages of others whose classes a run may build: those that the command line names.

No file can name one (`vitrim.cli.config_files`): whoever types the command decides whose code runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from vitrim.cli import guard
from vitrim.errors import ConfigError, shown

GROUP = "vitrim.plugins"
"""Entry points by which installed packages offer themselves, under a name of their choice."""
_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_]\w*)*")


def use(named: object, folder: Path) -> None:
    """Import the packages that a command names, and let `_target_` name their classes.

    A package is looked for where Python finds packages, then in `folder`. Those of an earlier
    command in this process are no longer trusted.

    Args:
        named: the value of `plugins`: names of packages, or of entry points.
        folder: the one in which the command was typed.

    Raises:
        ConfigError: a name is none, there is no such package, or it cannot be imported.
    """
    names = named if isinstance(named, list | tuple) else [named]
    packages = [_package(name, f"plugins={shown(named)}") for name in names]
    if packages and str(folder) not in sys.path:
        sys.path.append(str(folder))
    for name, package in zip(names, packages, strict=True):
        _import(package, str(name))
    guard.trust_named(packages)


def _package(name: object, where: str) -> str:
    """Return the package that a name stands for: an entry point's, or itself."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: expected names of packages, as in plugins=[mypkg]")
    offered = _offered()
    if name in offered:
        return offered[name]
    return name


def _offered() -> dict[str, str]:
    """Return the packages that installed ones offer, by name."""
    return {point.name: point.module for point in entry_points(group=GROUP)}


def _import(package: str, name: str) -> None:
    try:
        import_module(package)
    except Exception as error:  # the package is not ours: it may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{package}.".startswith(f"{missing}."):
            raise ConfigError(f"plugins: {_not_found(name)}") from None
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"plugins: {name} cannot be imported ({type(error).__name__}: {reason})"
        ) from error


def _not_found(name: str) -> str:
    offered = sorted(_offered())
    known = f", and installed packages offer {', '.join(offered)}" if offered else ""
    return (
        f"there is no package {name}{known}: install it, or run in the folder that it is in (or "
        "name that folder in PYTHONPATH)"
    )


def used_by(values: object, packages: Sequence[str]) -> list[str]:
    """Return those packages whose classes a part of a configuration names, sorted."""
    if isinstance(values, dict):
        target = str(values.get("_target_", ""))
        own = [name for name in packages if target.startswith(f"{name}.")]
        return sorted({*own, *(n for part in values.values() for n in used_by(part, packages))})
    if isinstance(values, list):
        return sorted({name for part in values for name in used_by(part, packages)})
    return []
