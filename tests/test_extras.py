"""What works without the packages of extras, what the others are told, and what a clone has."""

from __future__ import annotations

import os
import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from command import QUICK, Command
from compacts import compact, plan
from fresh import python
from vitrim import save
from vitrim.cli import start
from vitrim.errors import _EXTRAS as EXTRAS
from vitrim.errors import MissingPackage, missing_package, require_package

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
names = sys.argv[2].split(",")
for module in [*sys.modules]:
    if module.partition(".")[0] in names:
        del sys.modules[module]
sys.modules.update(dict.fromkeys(names))  # importing them is an error

import timm, torch, vitrim
net, plan = vitrim.load(sys.argv[1])
images = torch.randn(1, 3, 32, 32)
vitrim.from_pretrained(vitrim.save("again", net, plan))
dense = timm.create_model(plan.model["name"], **plan.model["args"])
assert vitrim.count(vitrim.cut(dense, plan), 32) == vitrim.count(net, 32)
timm.create_model("vitrim_compact", plan=__import__("json").loads(open("again/plan.json").read()))
for name in ("compress", "Prune", "run"):
    try:
        getattr(vitrim, name)
    except ImportError as error:
        print(error)

from vitrim.cli import start
try:
    start.vitrim()
except SystemExit as error:
    print(error)
"""


def test_a_network_is_loaded_without_the_packages_of_extras(tmp_path: Path) -> None:
    save(tmp_path / "saved", compact("vit"), plan("vit"))
    done = python("-c", WITHOUT, str(tmp_path / "saved"), ",".join(EXTRAS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *api, command = done.stdout.splitlines()
    assert len(api) == 3
    assert all("lightning is not installed: pip install 'vitrim[train]'" in line for line in api)
    assert command.startswith("vitrim: hydra is not installed: pip install 'vitrim[train]'")


@pytest.mark.parametrize(
    ("missing", "words", "message"),
    [
        ("sklearn", ["tracking=none"], r"data=digits: sklearn .* pip install 'vitrim\[digits\]'"),
        (
            "wandb",
            ["data=none", "tracking=offline"],
            r"tracking=offline: wandb .*'vitrim\[track\]', or tracking=none",
        ),
        ("mlflow", ["data=none", "tracking=mlflow"], r"tracking=mlflow: .*'vitrim\[mlflow\]'"),
    ],
)
def test_a_run_names_the_extra_that_it_needs(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.delitem(sys.modules, "vitrim.data.digits", raising=False)
    monkeypatch.delattr("vitrim.data.digits", raising=False)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    done = command(*QUICK, *words)
    assert done.code == 1
    assert re.search(message, done.message)
    assert not list(command.out.rglob("recipe.yaml"))


def test_a_report_names_the_extra_that_it_needs(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("data=none", "tracking=none", "latency.repeats=1", "strength=1")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["vitrim-report", str(command.out)])
    with pytest.raises(SystemExit, match=r"matplotlib .* pip install 'vitrim\[report\]'"):
        start.vitrim_report()


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_package(ModuleNotFoundError("no", name="mypkg")) is None
    assert missing_package(None) is None
    require_package("hydra", "vitrim")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackage, match="asked: wandb is not installed"):
        require_package("wandb", "asked")


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*EXTRAS.values()} <= project["optional-dependencies"].keys()
    core = " ".join(project["dependencies"])
    assert not [name for name in EXTRAS if name in core]


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_a_clone_has_what_the_readme_uses_and_a_wheel_what_loading_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("editables")
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    name = getattr(build, f"build_{kind}")(os.fspath(tmp_path))
    with zipfile.ZipFile(tmp_path / name) as wheel:
        (path,) = (entry for entry in wheel.namelist() if entry.endswith("METADATA"))
        lines = wheel.read(path).decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist") and "extra" not in line]
    for package in ("lightning", "hydra-core", "wandb", "matplotlib", "scikit-learn", "scipy"):
        assert any(f": {package}" in line for line in needed) == (kind == "editable")
