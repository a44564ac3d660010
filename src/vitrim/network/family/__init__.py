"""The families of networks: one module each, the only places that know timm's attribute names.

A module that is put here is found: it registers its network classes when it is imported.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
