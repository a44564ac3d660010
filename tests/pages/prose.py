"""How readable a Markdown document is: long sentences, wide cells, former words.

Code, tables, headings and HTML comments are no prose; a piece of inline code counts as one word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MOST_WORDS, WIDEST_CELL = 35, 160
FORMER = re.compile(
    r"\b(dream(s|ed|t|ing)?|fore(told|tells?|seen|sees?|sight)|befalls?|anew|hangs? on|"
    r"told|tells?|judge[sd]?|beside|so many|goes on|went on|mendable|"
    r"carved?|could not be had)\b|, too\b",
    re.IGNORECASE,
)
"""Words of the project's former dialect, which the documents do not use."""
_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|al|vs|Eq|eq)\.")


class Measures(NamedTuple):
    """What was measured of one document."""

    words: int
    sentences: int
    longest: str
    widest: str
    former: list[str]

    def __str__(self) -> str:
        mean = self.words / max(1, self.sentences)
        return (
            f"{self.words:5} words, {self.sentences:4} sentences of {mean:4.1f}, longest "
            f"{len(self.longest.split()):2}, widest cell {len(self.widest):3}, former {self.former}"
        )


def measure(text: str) -> Measures:
    """Measure a document."""
    prose, found = plain(text), [*sentences(text)]
    words = [len(sentence.split()) for sentence in found]
    return Measures(
        words=sum(words),
        sentences=len(found),
        longest=max(found, key=lambda sentence: len(sentence.split()), default=""),
        widest=max(cells(text), key=len, default=""),
        former=sorted({match[0] for match in FORMER.finditer(prose)}),
    )


def plain(text: str) -> str:
    """Return a document without code blocks and comments, links as their texts, code as a word."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|<a id=.*?</a>", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", "", text)
    text = re.sub(r"`[^`]+`", "CODE", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def sentences(text: str) -> Iterator[str]:
    """Return the sentences of paragraphs and of items of lists."""
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )", plain(text)):
        lines = [line for line in block.splitlines() if not line.lstrip().startswith(("|", "#"))]
        joined = _ABBREVIATIONS.sub(r"\1", " ".join(lines).strip().lstrip("*- "))
        yield from filter(None, re.split(r"(?<=[.!?])[*)\"]*\s+", joined))


def cells(text: str) -> Iterator[str]:
    """Return the cells of tables, links as their texts."""
    without = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    linked = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", without)
    for line in linked.splitlines():
        if line.startswith("|"):
            yield from (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
