"""Versions of the packages, and the commit, that a result depends on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path


def versions(*optional: str) -> dict[str, object]:
    """Return what a result depends on besides its recipe: package versions and vitrim's commit.

    `optional` are installed packages that only some runs use.
    """
    names = ("torch", "timm", "lightning", "hydra-core", "torchmetrics", *optional)
    commit, dirty = _revision(Path(__file__))
    return {
        "vitrim": metadata.version("vitrim"),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in names},
        },
        "commit": commit,
        "dirty": dirty,
    }


def _revision(file: Path) -> tuple[str | None, bool | None]:
    """Return the commit that `file` is of, and whether its repository has changes.

    Both are None for a file that git does not track: an installed vitrim may lie inside somebody
    else's repository, whose commit says nothing about it.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None, None
    commit = _git(file.parent, "rev-parse", "HEAD")
    return commit, bool(_git(file.parent, "status", "--porcelain")) if commit else None


def _git(folder: Path, *args: str) -> str | None:
    """Return the output of a git command, or None where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
