"""Versions and the commit of a result: vitrim's own, never that of a repository around it."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from vitrim import versions as own


def git(folder: Path, *args: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *args], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def module_at(path: Path) -> ModuleType:
    """Return the module `versions`, imported from a copy at `path`."""
    path.parent.mkdir(parents=True)
    shutil.copy(str(own.__file__), path)
    spec = spec_from_file_location("versions_elsewhere", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return somebody's repository with one commit."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "notes.txt").write_text("theirs")
    git(tmp_path, "add", "notes.txt")
    git(tmp_path, "commit", "--quiet", "-m", "theirs")
    return tmp_path


def test_versions_name_what_a_result_depends_on() -> None:
    recorded = own.versions()
    packages = recorded["versions"]
    assert isinstance(packages, dict)
    assert {"python", "torch", "timm", "lightning"} <= packages.keys()
    assert all(isinstance(version, str) and version for version in packages.values())


def test_a_repository_around_vitrim_is_not_recorded(repository: Path) -> None:
    installed = module_at(repository / "venv" / "lib" / "versions.py")
    assert installed.versions()["commit"] is None
    assert installed.versions()["dirty"] is None


def test_the_commit_of_vitrim_itself_is_recorded(repository: Path) -> None:
    checkout = module_at(repository / "src" / "versions.py")
    git(repository, "add", "src")
    git(repository, "commit", "--quiet", "-m", "vitrim")
    recorded = checkout.versions()
    assert recorded["commit"] == git(repository, "rev-parse", "HEAD")
    (repository / "notes.txt").write_text("changed")
    assert checkout.versions()["dirty"] is True


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    recorded = own.versions()
    assert (recorded["commit"], recorded["dirty"]) == (None, None)
