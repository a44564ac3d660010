r"""Texts of others in the formats that reports are written in: one function per format.

Names, options, paths, commits and reasons come from files that somebody else may have written.
Every writer passes them through the function of its format: nothing in them is then a link, a tag,
a formula, a control sequence or the end of a table's cell. What cannot be printed is shown as its
escape sequence, `\x1b` for example.

    terminal   a line for a terminal or a log        markdown   a text within Markdown
    lines      a message of several such lines
    html       a text for a template that escapes    cell       a text in a table of Markdown
    csv        a value in a CSV file                 code       code within Markdown
    figure     a text in a figure of matplotlib      word       a word of a command to be copied
    yaml       a value in YAML front matter    latex     a text in LaTeX
"""

from __future__ import annotations

import re
import textwrap

_MARKDOWN = re.compile(
    r"[\\`*\[\]{}~|$]"  # escapes, code, emphasis, links, templates, strikethrough, cells, formulas
    r"|(?<=\])\("  # the address of a link
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; within a word it is none
    r"|:(?=[^\s])"  # addresses that become links, emoji
    r"|(?<=www)\.",
    re.IGNORECASE,
)
_LINE_START = re.compile(r"([#>+=-]|\d+(?=[.)]))")
_FORMULA = re.compile(r"\s*['\"]*\s*[=+\-@|%\uff0b\uff0d\uff1d\uff20]")
_SAFE_WORD = re.compile(r"[\w@%+=:,./\[\]-]+", re.ASCII)
_LATEX = {
    **{c: f"\\{c}" for c in "#$%&_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"},
    **{"->": r"$\to$", '"': "''", "--": "-{}-", "`": r"\textasciigrave{}", "'": "'{}", "[": "{[}"},
}
_OF_LATEX = re.compile("->|--|[" + re.escape("".join(c for c in _LATEX if len(c) == 1)) + "]")
_NUMBER = re.compile(r"[+-]\d[\d.,]*")
_MAX_LABEL, _MAX_TITLE, _LABEL_END = 100, 240, 40


def terminal(text: object) -> str:
    r"""Return one line of text in which every character can be printed.

    Control characters, line breaks, invisible characters and those that change the direction of
    writing become escape sequences.

    >>> terminal("a\x1b[2Jb\nc\u202e")
    'a\\x1b[2Jb\\nc\\u202e'
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def lines(text: object) -> str:
    r"""Return a message of several lines for a terminal, each as `terminal` has it.

    >>> lines("a\x1b\nb")
    'a\\x1b\nb'
    """
    return "\n".join(map(terminal, str(text).split("\n")))


def html(text: object) -> str:
    """Return a text for a template that escapes `&`, `<`, `>` and quotes itself."""
    return terminal(text)


def yaml(text: object) -> str:
    """Return a text for a YAML writer, which quotes it: one line, in which no document ends."""
    return terminal(text)


def cell(text: object) -> str:
    r"""Return a text in a cell of a table of Markdown.

    >>> cell("[a](http://b) <img> x|y")
    '\\[a\\]\\(http\\://b) &lt;img> x\\|y'
    >>> cell("vit_digits"), cell("-2.00"), cell("4.00 -> 2.00")
    ('vit_digits', '-2.00', '4.00 -> 2.00')
    """
    escaped = _MARKDOWN.sub(r"\\\g<0>", terminal(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").strip()


def markdown(text: object) -> str:
    r"""Return a text within Markdown, at the beginning of a line or not.

    >>> markdown("# a *b*"), markdown("1. a")
    ('\\# a \\*b\\*', '1\\. a')
    """
    line = cell(text)
    start = _LINE_START.match(line)
    if start is None:
        return line
    number = start[0] if start[0].isdigit() else ""
    return f"{number}\\{line[len(number) :]}"


def code(text: object) -> str:
    r"""Return a text as code within Markdown.

    >>> code("a `b` | c")
    '`` a `b` | c ``'
    """
    line = terminal(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def csv(value: object) -> object:
    r"""Return a value in a CSV file: no text that a spreadsheet would take for a formula.

    >>> csv("=1+1"), csv(-1.5), csv("a\tb"), csv("\t=x")
    ("'=1+1", -1.5, 'a\\tb', "'\\t=x")
    """
    if not isinstance(value, str | list | dict):
        return value
    line = str(value)
    return f"'{terminal(line)}" if _FORMULA.match(line) else terminal(line)


def figure(text: object, *, width: int = 0) -> str:
    r"""Return a text in a figure of matplotlib: no mathematics, not too long.

    Args:
        text: what is drawn.
        width: at which number of characters a new line begins; 0: never.

    >>> figure("$x$")
    '\\$x\\$'
    """
    line = terminal(text)
    limit = _MAX_TITLE if width else _MAX_LABEL
    if len(line) > limit:  # the end tells labels apart
        line = f"{line[: limit - _LABEL_END - 1]}…{line[-_LABEL_END:]}"
    if line.startswith("_"):  # matplotlib leaves such labels out of the legend
        line = f" {line}"
    lines = textwrap.wrap(line, width) if width else [line]
    return "\n".join(lines).replace("$", r"\$")


def latex(text: object) -> str:
    r"""Return a text in LaTeX: no command, no ligature, and nothing but ASCII.

    >>> latex("vit_b \\input{x} 90.00 ± 0.50"), latex("-2.00"), latex("4 -> 2")
    ('vit\\_b \\textbackslash{}input\\{x\\} 90.00 $\\pm$ 0.50', '$-2.00$', '4 $\\to$ 2')
    """
    line = terminal(text)
    if _NUMBER.fullmatch(line):
        return f"${line}$"
    escaped = _OF_LATEX.sub(lambda match: _LATEX[match[0]], line)
    return "".join(c if c.isascii() else "?" for c in escaped)


def word(text: object) -> str:
    """Return a word of a command line, quoted where a shell would not take it as it is.

    >>> word("method.allowed_blocks=[blocks.3]"), word("a; b")
    ('method.allowed_blocks=[blocks.3]', "'a; b'")
    """
    line = terminal(text)
    if _SAFE_WORD.fullmatch(line):
        return line
    quoted = line.replace("'", "'\"'\"'")
    return f"'{quoted}'"
