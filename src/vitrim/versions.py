"""Versions of the packages and the commit that a result depends on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


def versions(*optional: str) -> dict[str, Any]:
    """Return what a result depends on beside its recipe: package versions and the commit.

    `optional` are installed packages that not every run uses.
    """
    names = ("torch", "timm", "lightning", "hydra-core", "torchmetrics", *optional)
    here = Path(__file__).parent
    commit = _git(here, "rev-parse", "HEAD")
    return {
        "vitrim": metadata.version("vitrim"),
        "versions": {
            "python": platform.python_version(),
            **{n: metadata.version(n) for n in names},
        },
        "commit": commit,
        "dirty": bool(_git(here, "status", "--porcelain")) if commit else None,
    }


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
