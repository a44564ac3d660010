"""vitrim: compress vision transformers, and show what it cost.

>>> import vitrim
>>> vitrim.Keep(site="blocks.0.mlp.hidden", index=(0, 2)).index
(0, 2)
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "vitrim.store",
    "save": "vitrim.store",
    "cut": "vitrim.network.surgery",
    "masked": "vitrim.network.surgery",
    "compose": "vitrim.network.surgery",
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


class _AlongWithTimm(MetaPathFinder):
    """Registers our networks right after timm's own: `import vitrim` need not wait for timm."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """Return the spec of timm as others find it, with the registration after its execution."""
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module("vitrim.model.compact")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    import_module("vitrim.model.compact")
else:
    sys.meta_path.insert(0, _AlongWithTimm())
