"""The families of networks, one module each: the only modules that know timm's attribute names.

Every module in this folder is imported when `vitrim.network` is, and registers its network classes
(`structure.register`, ...). A new family is one new file; nothing else lists the families. May
import: the rest of `vitrim.network`, and what `vitrim.network` may import.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
