"""Texts of others in every format: what a reader of that format makes of them."""

from __future__ import annotations

import csv
import io

import pytest
import yaml
from markdown_it import MarkdownIt
from matplotlib.cbook import is_math_text

from vitrim.deploy.table import markdown_table
from vitrim.files import escape

EVIL = (
    *("[a](http://x.org)", "![a](http://x.org/a.png)", "[a][b]", "<img src=x onerror=y>", "<b>"),
    *("<http://x.org>", "https://x.org", "www.x.org", "`code`", "**bold**", "__bold__", "_a_"),
    *("~~gone~~", "a | b", "a\\| b", "\\", "\\[a](b)", "# head", "> quote", "- item", "+ item"),
    *(
        "1. item",
        "2) item",
        "---",
        "===",
        "```",
        "~~~",
        "    code",
        "\tcode",
        "a\n\n# b",
        "a\r\n|b",
    ),
    *("&lt;b&gt;", "$x$", "{{ x }}", "{% x %}", ":smile:", "<!-- x", "a  \nb", "[a]: http://x.org"),
    *("\x1b[2J", "\x9b2J", "\u202eabc", "\u2066a", "a\u2028b", "\x00", "\ud800", "\x07", "\u200b"),
)


def tokens(text: str) -> set[str]:
    """Return the kinds of everything in a text of Markdown, with GitHub's extensions."""
    reader = MarkdownIt("gfm-like", {"linkify": False})
    found = {token.type for token in reader.parse(text)}
    for token in reader.parse(text):
        found |= {child.type for child in token.children or ()}
    return found


@pytest.mark.parametrize("text", EVIL, ids=range(len(EVIL)))
def test_nothing_is_markup_in_markdown(text: str) -> None:
    paragraph = {"paragraph_open", "inline", "text", "paragraph_close"}
    assert tokens(escape.markdown(text)) <= paragraph
    assert tokens(f"* {escape.markdown(text)}") <= {
        *paragraph,
        *("bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"),
    }
    assert tokens(f"a {escape.code(text)} b") == {*paragraph, "code_inline"}


@pytest.mark.parametrize("text", EVIL, ids=range(len(EVIL)))
def test_a_cell_stays_a_cell(text: str) -> None:
    table = markdown_table([["head", "b"], [text, "end"]], left=1)
    plain = markdown_table([["head", "b"], ["text", "end"]], left=1)
    assert tokens("\n".join(table)) <= tokens("\n".join(plain))
    rows = [token for token in MarkdownIt("gfm-like", {"linkify": False}).parse("\n".join(table))]
    assert sum(token.type in ("th_open", "td_open") for token in rows) == 4


def test_ordinary_names_look_the_same() -> None:
    for text in (
        "vit_digits",
        "imagefolder",
        "0.60",
        "-2.00",
        "4.00 -> 2.00 (2.00x)",
        "90 ± 2",
        "-",
    ):
        assert escape.cell(text) == text
        assert escape.terminal(text) == text


@pytest.mark.parametrize("text", EVIL, ids=range(len(EVIL)))
def test_a_line_is_printable_everywhere(text: str) -> None:
    for form in (escape.terminal, escape.html, escape.cell, escape.markdown, escape.code):
        assert form(text).isprintable()
        form(text).encode()
    assert not is_math_text(escape.figure(text))
    assert yaml.safe_load(yaml.safe_dump({"a": escape.yaml(text)})) == {"a": escape.yaml(text)}


@pytest.mark.parametrize(
    "start", ["=", "+", "-", "@", "\t=", "\r=", " =", "\n=", "|", "%", "\uff1d"]
)
def test_a_spreadsheet_sees_no_formula(start: str) -> None:
    file = io.StringIO()
    csv.writer(file).writerow([escape.csv(f"{start}cmd"), escape.csv(-1.5), escape.csv(None)])
    ((text, number, nothing),) = csv.reader(io.StringIO(file.getvalue()))
    assert text.startswith("'")
    assert (number, nothing) == ("-1.5", "")


def test_labels_have_an_end_and_lines() -> None:
    label = escape.figure("a" * 300 + " last", width=50)
    assert label.endswith("last")
    assert len(label) < 250
    assert len(escape.figure("a" * 300)) == 100
    assert max(map(len, label.split("\n"))) <= 50
    assert escape.figure("_hidden") == " _hidden"


def test_a_word_of_a_command_is_one_word() -> None:
    assert escape.word("method.allowed_blocks=[blocks.3]") == "method.allowed_blocks=[blocks.3]"
    assert escape.word("a'; rm -rf /") == "'a'\"'\"'; rm -rf /'"
