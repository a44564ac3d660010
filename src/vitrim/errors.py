"""The errors that a user can mend; the command prints them as one message, without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A choice that cannot work: the message names the key, the value and what is allowed."""
