"""Versions and the commit of a result: vitrim's own, never that of a repository around it."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from vitrim import versions as own


@pytest.fixture(autouse=True)
def _not_asked_before() -> None:
    own._revision.cache_clear()


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


@pytest.mark.parametrize("path", ["lib/site-packages/vitrim", "third_party/vitrim/src/vitrim"])
def test_a_repository_that_tracks_vitrims_files_is_not_recorded(
    repository: Path, path: str
) -> None:
    copied = module_at(repository / path / "versions.py")
    if "third_party" in path:
        write_project(repository / "third_party" / "vitrim", "vitrim")
    write_project(repository, "theirs")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "with their copy of vitrim")
    assert copied.versions()["commit"] is None


def test_a_commit_that_pip_recorded_is_that_of_an_installed_vitrim(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = module_at(repository / "venv" / "vitrim" / "versions.py")
    info = repository / "venv" / "vitrim-0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vitrim\nVersion: 0.9\n")
    source = {"url": "https://example.org", "vcs_info": {"vcs": "git", "commit_id": "0123abcd"}}
    (info / "direct_url.json").write_text(json.dumps(source))
    monkeypatch.syspath_prepend(str(repository / "venv"))
    recorded = installed.versions()
    assert (recorded["vitrim"], recorded["commit"], recorded["dirty"]) == ("0.9", "0123abcd", False)
    elsewhere = module_at(repository / "other" / "vitrim" / "versions.py")
    assert elsewhere.versions()["commit"] is None


def test_a_hook_of_another_repository_does_not_matter(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(repository))
    assert own.versions()["commit"] != git(repository, "rev-parse", "HEAD")


def write_project(folder: Path, name: str) -> None:
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')


def test_the_commit_of_vitrim_itself_is_recorded(repository: Path) -> None:
    checkout = module_at(repository / "src" / "vitrim" / "versions.py")
    write_project(repository, "vitrim")
    git(repository, "add", "src", "pyproject.toml")
    git(repository, "commit", "--quiet", "-m", "vitrim")
    recorded = checkout.versions()
    assert recorded["commit"] == git(repository, "rev-parse", "HEAD")
    (repository / "notes.txt").write_text("changed")
    assert checkout.versions()["dirty"] is False  # this process has begun with the commit
    checkout._revision.cache_clear()
    assert checkout.versions()["dirty"] is True


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    recorded = own.versions()
    assert (recorded["commit"], recorded["dirty"]) == (None, None)
