"""Papers of the project: the citation, the licence and the changelog agree with the package."""

from pathlib import Path

import yaml

import vitrim

ROOT = Path(__file__).parents[1]


def test_the_citation_is_of_this_version_and_licence() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors", "version", "license"} <= set(cited)
    assert (cited["title"], cited["version"]) == ("vitrim", vitrim.__version__)
    assert (ROOT / "LICENSE").read_text().startswith(f"{cited['license']} License")


def test_the_changelog_begins_with_what_is_not_released() -> None:
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert headings[0] == "## [Unreleased]"
