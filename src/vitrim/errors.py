"""Errors that a user can fix; the command prints them as one message, without a traceback."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from typing import TypeGuard, cast


class VitrimError(ValueError):
    """Something that cannot work: the message states what, its value, and what is allowed."""


class ConfigError(VitrimError):
    """A choice on the command line or in a yaml that cannot work."""


class MissingPackage(ConfigError, ImportError):
    """A package that is not installed; the message states the extra that has it."""


_EXTRAS = {
    **dict.fromkeys(("lightning", "torchmetrics", "hydra", "omegaconf", "rich"), "train"),
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
    **{"wandb": "track", "tensorboard": "tensorboard", "mlflow": "mlflow"},
    **{"sklearn": "digits", "scipy": "digits", "datasets": "huggingface"},
}
"""Packages that vitrim.load does without, by their name in Python, and their extra."""


def missing_package(error: BaseException | None) -> MissingPackage | None:
    """Return what to install, if `error` or a cause of it is the lack of a package of an extra."""
    while error is not None:
        if isinstance(error, MissingPackage):
            return error
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            name = error.name.partition(".")[0]
            if name in _EXTRAS:
                return MissingPackage(
                    f"{name} is not installed: pip install 'vitrim[{_EXTRAS[name]}]', or "
                    "'vitrim[all]' for all that the commands use"
                )
        error = error.__cause__
    return None


def require_package(name: str, asked: str) -> None:
    """Refuse what needs a package of an extra that is not installed, without importing it.

    Raises:
        MissingPackage: naming what was `asked` for, and the extra.
    """
    if importable(name):
        return
    raise MissingPackage(f"{asked}: {name} is not installed: pip install 'vitrim[{_EXTRAS[name]}]'")


def importable(name: str) -> bool:
    """Whether a package is installed."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # blocked, or half imported
        return False


def is_count(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer from 1 (True is not)."""
    return type(value) is int and value >= 1


def is_rate(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number from 0 (True is not)."""
    return type(value) in (int, float) and 0 <= cast(float, value) < math.inf


def is_positive(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number above 0 (True is not)."""
    return is_rate(value) and value > 0


def shown(value: object) -> str:
    """Return a value as it is typed on the command line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{','.join(map(shown, value))}]"
        case _:
            return str(value)


def shortened(message: str) -> str:
    """Return a message without the middle of words and lines that are too long to read."""
    lines = (re.sub(r"\S{400,}", _cut, line) for line in message.splitlines())
    return _cut_to("\n".join(_cut_to(line, 4000) for line in lines), 100_000)


def _cut(word: re.Match[str]) -> str:
    return _cut_to(word[0], 300)


def _cut_to(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    kept = length // 2
    return f"{text[:kept]}... ({len(text):,} characters) ...{text[-kept:]}"


def require(where: str, owner: object, *rules: tuple[str, bool, str]) -> None:
    """Check fields of `owner`; report all fields that are wrong together.

    Args:
        where: the key of `owner` in the config.
        owner: the object with the fields.
        rules: for each field its name, whether its value is valid, and what is allowed.

    Raises:
        ConfigError: naming every invalid field, its value and what is allowed.
    """
    problems = [
        f"{where}.{name}={shown(getattr(owner, name))}: expected {allowed}"
        for name, valid, allowed in rules
        if not valid
    ]
    if problems:
        raise ConfigError("; ".join(problems))
