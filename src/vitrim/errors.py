"""Errors that a user can fix; the command prints them as one message, without a traceback."""

from __future__ import annotations

import math
import re
from typing import TypeGuard, cast


class VitrimError(ValueError):
    """Something that cannot work: the message states what, its value, and what is allowed."""


class ConfigError(VitrimError):
    """A choice on the command line or in a yaml that cannot work."""


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
