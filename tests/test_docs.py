"""The project's documents: they agree with the package, and what they name exists."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

import vitrim
from vitrim.cli.compose import CONF
from vitrim.cli.renamed import RENAMED

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "results/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
)


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors", "version", "license"} <= set(citation)
    assert (citation["title"], citation["version"]) == ("vitrim", vitrim.__version__)
    assert (ROOT / "LICENSE").read_text().startswith(f"{citation['license']} License")


def test_the_changelog_begins_with_what_is_not_released() -> None:
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    ]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert headings[0] == "## [Unreleased]"
    assert headings[1] == f"## [{vitrim.__version__}] - {citation['date-released']}"


def test_the_changelog_names_every_renamed_key() -> None:
    words = set(re.findall(r"\w+", (ROOT / "CHANGELOG.md").read_text()))
    assert RENAMED
    for former, present in RENAMED.items():
        assert {former.rpartition(".")[2], *re.findall(r"\w+$", present)} <= words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:src|conf|tests|results|docs|\.ci)/[\w./-]*)`", text))
    named = {path for path in named if "NAME" not in path}  # a word in capitals is yours
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_documents_name_files_and_modules() -> None:
    assert len(DOCUMENTS) > 25
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    assert text.count("`src/vitrim/") >= 5
    assert text.count("`vitrim.") >= 20


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_and_names_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`(vitrim(?:\.\w+)+)`", text))
    named |= set(re.findall(r"\bvitrim\.\w+(?=\()", text))
    named |= set(re.findall(r"\bimport (vitrim(?:\.\w+)+)", text))
    named |= set(re.findall(r"^::: (vitrim(?:\.\w+)+)", text, re.MULTILINE))
    assert [name for name in sorted(named) if not _exists(name)] == []


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parent, _, last = name.rpartition(".")
    try:
        import_module(name)
    except ImportError:
        return hasattr(import_module(parent), last)
    return True


def test_the_sweep_of_an_agent_composes() -> None:
    text = (ROOT / "docs" / "tracking.md").read_text()
    block = next(
        b for b in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S) if "agent" not in b
    )
    swept = yaml.safe_load(block)
    values = {key: one.get("value", one.get("min")) for key, one in swept["parameters"].items()}
    values = {
        key: swept["parameters"][key]["values"][0] if v is None else v for key, v in values.items()
    }
    words = [f"{key}={value}" for key, value in values.items()]  # as ${args_no_hyphens} writes them
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[swept["command"][2], *words])
    assert (cfg.tracking, cfg.target.macs) == ("online", 0.6)
    assert swept["metric"]["name"] in ("top1", "macs")  # what a run logs at its end
