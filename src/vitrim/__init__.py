"""vitrim: compress vision transformers, and show what it cost.

>>> import vitrim
>>> vitrim.Keep(site="blocks.0.mlp.hidden", index=(0, 2)).index
(0, 2)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "vitrim.store",
    "save": "vitrim.store",
    "cut": "vitrim.surgery",
    "masked": "vitrim.surgery",
    "compose": "vitrim.surgery",
    "count": "vitrim.measure",
    "Plan": "vitrim.plan",
    "Keep": "vitrim.plan",
    "LowRank": "vitrim.plan",
    "Drop": "vitrim.plan",
    "Evidence": "vitrim.plan",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `vitrim --help` must not wait for torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vitrim' has no attribute {name!r}")
