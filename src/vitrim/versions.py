"""Versions of the packages, and the commit, that a result depends on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

PROJECT = "vitrim"
_HERE = ("src", PROJECT, "versions.py")
"""Path of this file in a checkout of vitrim."""


def versions() -> dict[str, object]:
    """Return what a result depends on besides its recipe: package versions and vitrim's commit.

    The commit is that of vitrim's own checkout, with whether it has changes; for an installed
    vitrim it is the one that pip recorded, if it installed from a repository. Both are None where
    they are not known. Both are as at the first call: a process goes on with the code it has.
    """
    names = ("torch", "timm", "lightning", "hydra-core", "torchmetrics")
    commit, dirty = _revision(Path(__file__).resolve())
    return {
        "vitrim": metadata.version(PROJECT),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in names},
        },
        "commit": commit,
        "dirty": dirty,
    }


@cache
def _revision(file: Path) -> tuple[str | None, bool | None]:
    """Return the commit that `file` is of, and whether its checkout has changes.

    An installed vitrim may lie inside somebody else's repository, which may even track its files:
    the commit of that repository says nothing about vitrim.
    """
    checkout = _checkout(file)
    if checkout is None:
        commit = _installed_commit(file)
        return commit, None if commit is None else False
    commit = _git(checkout, "rev-parse", "HEAD")
    return commit, bool(_git(checkout, "status", "--porcelain")) if commit else None


def _checkout(file: Path) -> Path | None:
    """Return the root of vitrim's own repository, if `file` is tracked there."""
    if file.parts[-len(_HERE) :] != _HERE:
        return None
    root = file.parents[len(_HERE) - 1]
    if not _is_project(root / "pyproject.toml"):
        return None
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    return root if _git(root, "ls-files", "--error-unmatch", "/".join(_HERE)) else None


def _is_project(path: Path) -> bool:
    """Whether a pyproject.toml is vitrim's."""
    try:
        project = tomllib.loads(path.read_text("utf-8")).get("project", {})
    except (OSError, ValueError):
        return False
    return isinstance(project, dict) and project.get("name") == PROJECT


def _installed_commit(file: Path) -> str | None:
    """Return the commit from which pip installed the vitrim that `file` is part of."""
    try:
        installed = metadata.distribution(PROJECT)
        if Path(str(installed.locate_file(f"{PROJECT}/{file.name}"))).resolve() != file:
            return None
        source = json.loads(installed.read_text("direct_url.json") or "{}")
        commit = source["vcs_info"]["commit_id"]
    except (metadata.PackageNotFoundError, OSError, ValueError, LookupError, TypeError):
        return None
    return commit if isinstance(commit, str) else None


def _git(folder: Path, *args: str) -> str | None:
    """Return the output of a git command in `folder`, or None where it fails.

    Variables such as GIT_DIR, which hooks set, name another repository, and are not passed on.
    """
    unset = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=unset)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
