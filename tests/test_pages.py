"""The documents are made of their files, easy to read, and lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pages.prose import MOST_WORDS, WIDEST_CELL, measure
from pages.written import DOCS, ROOT, changed

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *DOCS.rglob("*.md"))
)


def test_generated_pages_agree_with_their_files() -> None:
    stale = [path.relative_to(ROOT).as_posix() for path in changed()]
    assert stale == [], "python -m tests.pages writes them"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_is_readable(document: str) -> None:
    measures = measure((ROOT / document).read_text("utf-8"))
    print(f"{document:30} {measures}")
    assert len(measures.longest.split()) <= MOST_WORDS, measures.longest
    assert len(measures.widest) <= WIDEST_CELL, measures.widest
    assert measures.former == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_a_document_lead_to_files_and_anchors(document: str) -> None:
    path = ROOT / document
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def anchors(path: Path) -> set[str]:
    """Return the anchors of a Markdown file: of its headings and of its `<a id>`."""
    text = path.read_text("utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))
