"""The errors that a user can mend; the command prints them as one message, without a traceback."""

from __future__ import annotations

import math
from typing import Any


class VitrimError(ValueError):
    """Something that cannot work: the message names it, its value, and what is allowed."""


class ConfigError(VitrimError):
    """A choice on the command line or in a yaml that cannot work."""


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 1 on (True is not)."""
    return type(value) is int and value >= 1


def is_rate(value: Any) -> bool:
    """Whether `value` is a finite number from 0 on (True is not)."""
    return type(value) in (int, float) and 0 <= value < math.inf


def is_positive(value: Any) -> bool:
    """Whether `value` is a finite number above 0 (True is not)."""
    return is_rate(value) and value > 0


def require(where: str, owner: object, *rules: tuple[str, bool, str]) -> None:
    """Check fields of `owner`: by rule the field, whether its value fits, and what is allowed.

    Args:
        where: the owner's key in the config.
        owner: what has the fields.
        rules: those to check together.

    Raises:
        ConfigError: naming every field that does not fit, its value and what is allowed.
    """
    problems = [
        f"{where}.{name}={getattr(owner, name)}: expected {allowed}"
        for name, fits, allowed in rules
        if not fits
    ]
    if problems:
        raise ConfigError("; ".join(problems))


class ReportError(ValueError):
    """A folder without reports, or a report.json that no run of vitrim wrote."""
