"""Where the commands begin: a package of an extra that is missing ends in one sentence."""

from __future__ import annotations

import sys
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


vitrim = partial(start, "app")
vitrim_export = partial(start, "export")
vitrim_report = partial(start, "report")
vitrim_eval = partial(start, "evaluate")
vitrim_bench = partial(start, "bench")
vitrim_import = partial(start, "importer")
vitrim_prepare = partial(start, "prepare")
