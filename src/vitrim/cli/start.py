"""Where the commands begin: a package of an extra that is missing ends in one sentence."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from vitrim.errors import missing_package


def start(name: str) -> None:
    """Run the `main` of a module of `vitrim.cli`."""
    try:
        import_module(f"vitrim.cli.{name}").main()
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        sys.exit(f"vitrim: {missing}")


@contextmanager
def uncollected() -> Iterator[None]:
    """Import for the first time without looking for garbage, which takes a seventh of the time.

    torch, Lightning and timm are a million objects; no later collection looks at them either.
    """
    first = "lightning" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


vitrim = partial(start, "app")
vitrim_export = partial(start, "export")
vitrim_report = partial(start, "report")
vitrim_eval = partial(start, "evaluate")
vitrim_bench = partial(start, "bench")
vitrim_import = partial(start, "importer")
vitrim_prepare = partial(start, "prepare")
