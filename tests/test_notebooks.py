"""The notebooks run on a small sweep, define nothing, and come without outputs."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import nbformat
import pytest
from hydra.core.global_hydra import GlobalHydra
from nbclient import NotebookClient

from command import EVERY_IMAGE, QUICK
from vitrim.cli.app import main

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SHORT = (
    *("experiment=demo", "control=false", "method.gating.epochs=1", "method.fine_tuning.epochs=1"),
    *(*QUICK, EVERY_IMAGE),
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose `outputs/` hold a dense and a compact network of the digits."""
    root = tmp_path_factory.mktemp("demo")
    for strength in (0, 3):  # in this process: each job of a sweep would import torch again
        overrides = [*SHORT, f"strength={strength}", f"out={root / 'outputs'}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["vitrim", *overrides])
            GlobalHydra.instance().clear()
            main()
    (root / "notebooks").mkdir()
    return root


def test_the_notebooks_are_found() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["pruned", "quickstart", "sweep"]


def test_the_notebooks_run_on_a_sweep(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm, without ipywidgets
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    in_turn = nbformat.v4.new_notebook()  # one kernel, which imports torch once
    for notebook in notebooks:
        in_turn.cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    NotebookClient(
        in_turn,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(sweep / "notebooks")}},
    ).execute()
    for path, notebook in zip(NOTEBOOKS, notebooks, strict=True):
        outputs = outputs_of(notebook)
        assert any("image/png" in output.get("data", {}) for output in outputs), path
        assert [o["text"] for o in outputs if o.get("name") == "stderr"] == [], path


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_and_has_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert outputs_of(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.execution_count for cell in code)
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    assert not any(isinstance(node, definitions) for node in nodes)
