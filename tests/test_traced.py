"""Numbers of documents are those of the results that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"results/(\w+)\.json|results\.md#(\w+)")
NUMBER = re.compile(r"(?<![\d.,])\d+\.\d+(?![\d.])")
GENERATED = {"results.md", "configuration.md", "experiments.md"}
PAGES = [page for page in (ROOT / "docs").rglob("*.md") if page.name not in GENERATED]


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Iterate over the sections of a page that name results, with the names of their files."""
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        names = [first or second for first, second in NAMED.findall(section)]
        if names:
            yield section, [name for name in names if (ROOT / f"results/{name}.json").is_file()]


def numbers_of(value: object) -> Iterator[float]:
    match value:
        case dict():
            for part in value.values():
                yield from numbers_of(part)
        case list():
            for part in value:
                yield from numbers_of(part)
        case int() | float():
            yield value


def claimed(section: str) -> list[str]:
    """Return the numbers with decimals in tables, and in the texts of links to results."""
    tables = [line for line in section.splitlines() if line.startswith("|")]
    links = re.findall(r"\[([^\]]*)\]\((?:\.\./)?results\.md#\w+\)", section)
    return [number for text in (*tables, *links) for number in NUMBER.findall(text)]


def test_pages_name_results() -> None:
    found = [claimed(section) for page in PAGES for section, _ in sections(page.read_text())]
    assert sum(map(len, found)) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_are_those_of_the_named_results(page: Path) -> None:
    for section, names in sections(page.read_text()):
        texts = [(ROOT / f"results/{name}.json").read_text() for name in names]
        known = [number for text in texts for number in numbers_of(json.loads(text))]
        for number in claimed(section):
            decimals = len(number.partition(".")[2])
            step = 0.5 * 10.0**-decimals + 1e-9
            assert any(abs(value - float(number)) <= step for value in known), (number, section)
