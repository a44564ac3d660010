"""Gives timm the name `vitrim_compact`, whichever of vitrim and timm is imported first.

`import vitrim` calls `register`. It does not wait for timm: if timm is not there yet, the name is
registered as soon as timm's registry is imported, by whomever.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "timm.models._registry"


def vitrim_compact(pretrained: bool = False, **kwargs: object) -> object:
    """Build the compact network of a plan: `vitrim.deploy.compact.vitrim_compact`."""
    from vitrim.deploy import compact

    return compact.vitrim_compact(pretrained, **kwargs)  # type: ignore[arg-type]


def register() -> None:
    """Give timm the name, now if timm's registry is imported, else when it is."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None:
        _register_in(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_in(registry: ModuleType) -> None:
    if not registry.is_model(vitrim_compact.__name__):
        registry.register_model(vitrim_compact)


class _Finder(MetaPathFinder):
    """Finds timm's registry as others do. What only looks for timm does not import it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the registry, with `_Loader` around its loader."""
        if fullname != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        for finder in others:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """Executes the registry by its own loader, then registers the name, and leaves no trace."""

    def __init__(self, own: Loader, finder: _Finder) -> None:
        self.own = own
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what its own loader does."""
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the registry and register the name in it."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        module.__loader__ = self.own
        self.own.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register_in(module)
