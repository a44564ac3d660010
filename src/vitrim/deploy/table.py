"""The writers of tables: for a terminal, by rich, as Markdown and LaTeX; all escape every cell.

A table is a sequence of lines of texts, the headings first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitrim.files import escape

if TYPE_CHECKING:
    from rich.table import Table

Lines = Sequence[Sequence[str]]


def terminal_table(lines: Lines, *, left: int) -> Table:
    """Return a table for rich; the first `left` columns are aligned to the left and may wrap."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    head, *rest = lines
    for i, name in enumerate(head):
        table.add_column(
            Text(escape.terminal(name).replace(" ", "\n")),
            justify="left" if i < left else "right",
            no_wrap=i >= left,
            vertical="bottom",
        )
    for line in rest:
        table.add_row(*(Text(escape.terminal(cell)) for cell in line))
    return table


def markdown_table(lines: Lines, *, left: int) -> list[str]:
    r"""Return lines of Markdown; the first `left` columns are aligned to the left.

    >>> markdown_table([["method", "top-1"], ["a|b", "90.00"]], left=1)
    ['| method | top-1 |', '| :--- | ---: |', '| a\\|b | 90.00 |']
    >>> markdown_table([], left=1)
    []
    """
    if not lines:
        return []
    align = [":---" if i < left else "---:" for i in range(len(lines[0]))]
    cells = [[escape.cell(cell) for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in (cells[0], align, *cells[1:])]


def latex_table(lines: Lines, *, left: int) -> list[str]:
    r"""Return lines of LaTeX: a tabular of the package booktabs.

    >>> latex_table([["method", "top-1"], ["a_b", "90.00"]], left=1)[2:5]
    ['method & top-1 \\\\', '\\midrule', 'a\\_b & 90.00 \\\\']
    """
    if not lines:
        return []
    columns = "".join("l" if i < left else "r" for i in range(len(lines[0])))
    head, *rest = (" & ".join(map(escape.latex, line)) + r" \\" for line in lines)
    body = [r"\toprule", head, r"\midrule", *rest, r"\bottomrule"]
    return [rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]
