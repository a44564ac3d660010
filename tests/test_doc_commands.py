"""The commands in the documents are those that exist, and their Python code runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import vitrim
from pages.written import DOCS, ROOT
from test_experiments import CONF, documented
from vitrim.cli import bench, export, importer, prepare, report

PARSERS = {
    "vitrim-report": report._parser,
    "vitrim-bench": bench._parser,
    "vitrim-export": export._parser,
    "vitrim-import": importer._parser,
    "vitrim-prepare": prepare._parser,
}
NAME = "vit_tiny_patch16_224"
CREATE = timm.create_model
SMALL = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 7}
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ELSEWHERE = ("own_network",)
"""Pages whose code runs in a test of their own: tests/api/test_own_network.py."""
# Fragments that need more than what is shown are marked ```py.
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def lines_of(program: str) -> set[str]:
    return {
        line.partition(f"{program} ")[2]
        for lines in documented().values()
        for line in lines
        if line.startswith(f"{program} ")
    }


@pytest.mark.parametrize("program", PARSERS)
def test_flags_in_the_documents_exist(program: str) -> None:
    found = lines_of(program)
    assert found or program == "vitrim-import"
    for line in found:
        PARSERS[program]().parse_intermixed_args(shlex.split(line, comments=True))


def test_evaluations_in_the_documents_compose() -> None:
    found = lines_of("vitrim-eval")
    assert found
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for line in found:
            compose("eval", overrides=shlex.split(line, comments=True)[1:])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a compact network in `RUN`, and its export for timm."""
    root = tmp_path_factory.mktemp("documents")
    model = {"name": NAME, "args": {"depth": 1}}
    edits = (vitrim.Keep(site="blocks.0.mlp.hidden", index=tuple(range(384))),)
    plan = vitrim.Plan(model=model, edits=edits)
    compact = vitrim.cut(timm.create_model(NAME, depth=1), plan)
    vitrim.save(root / "RUN", compact, plan)
    export.main([str(root / "RUN"), "--format", "timm"])
    return root


def small(name: str, *, pretrained: bool = False, **args: object) -> nn.Module:
    """Build a network of timm; in place of one with downloaded weights, a small one."""
    downloaded = pretrained and not name.startswith("local-dir:")
    return CREATE(name, **(SMALL if downloaded else {"pretrained": pretrained, **args}))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.stem not in ELSEWHERE and BLOCK.search(page.read_text())],
    ids=lambda page: page.stem,
)
def test_python_code_of_a_document_runs(
    page: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    monkeypatch.setattr(timm, "create_model", small)  # for pretrained=True, which downloads
    names: dict[str, object] = {"images": torch.randn(8, 3, 32, 32)}
    for number, code in enumerate(BLOCK.findall(page.read_text())):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    assert "vitrim" in names
