"""Layouts of figures: for screens, and for the columns of a paper; the formats of their files."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

Settings = dict[str, Any]
"""Settings, or keyword arguments, of matplotlib."""
_LEGEND_WIDTH = 15.0  # characters per inch, in letters of 8 points
_WRAPPING: Settings = {"break_long_words": False, "drop_whitespace": False}
_REPRODUCIBLE: Settings = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
_EMBEDDED: Settings = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "vitrim"}


class Layout(NamedTuple):
    """How wide figures are, how many panels stand side by side, and how large letters are.

    Args:
        width: in inches.
        columns: panels side by side, at most.
        font: size of letters in points.
        formats: in which a figure is saved, as suffixes of file names.
    """

    width: float
    columns: int
    font: float
    formats: tuple[str, ...]

    @property
    def style(self) -> Settings:
        """Settings of matplotlib."""
        small = self.font - 1
        return {
            **{"font.size": self.font, "axes.titlesize": small, "legend.fontsize": small},
            **{"xtick.labelsize": small, "ytick.labelsize": small},
            **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
        }


SCREEN = Layout(width=7.0, columns=2, font=9.0, formats=("png",))
PRINTED = {
    "text": Layout(width=6.75, columns=2, font=8.0, formats=("pdf", "svg")),
    "column": Layout(width=3.25, columns=1, font=7.0, formats=("pdf", "svg")),
}
"""Layouts of papers with two columns: the width of the text, and of one column."""


def with_legend(
    figure: Figure, handles: Sequence[Artist], layout: Layout, title: str = ""
) -> Figure:
    """Return the figure with its legend, if there are handles, above it under a title."""
    if handles:
        width = int(_LEGEND_WIDTH * layout.width * 8 / (layout.font - 1))
        for handle in handles:
            label = textwrap.wrap(str(handle.get_label()), width - 9, **_WRAPPING)
            handle.set_label("\n".join(label))
        columns = _legend_columns([str(handle.get_label()) for handle in handles], width)
        look: Settings = {"loc": "outside upper center", "ncols": columns}
        figure.legend(handles=handles, title=title or None, **look)
    return figure


def _legend_columns(labels: Sequence[str], width: int) -> int:
    widths = [len(label) + 9 for label in labels]  # nine characters for the line of each label
    return len(labels) if sum(widths) <= width else max(1, width // max(widths))


def title_width(layout: Layout, columns: int) -> int:
    """Return how many characters fit in a line above one of several columns of panels."""
    return int(100 * layout.width / SCREEN.width * SCREEN.font / layout.font) // columns


def rendered(figures: Mapping[str, Figure], layout: Layout) -> dict[str, bytes]:
    """Return the files of figures by name: each figure in every format of the layout."""
    return {
        f"{name}.{suffix}": render(figure, suffix)
        for name, figure in figures.items()
        for suffix in layout.formats
    }


def render(figure: Figure, suffix: str = "png") -> bytes:
    """Return a figure as the content of a file: png (300 dpi), pdf or svg; the same each time."""
    from matplotlib import style

    content = io.BytesIO()
    with warnings.catch_warnings(), style.context(_EMBEDDED):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in any script
        figure.savefig(content, format=suffix, dpi=300, metadata=_REPRODUCIBLE[suffix])
    return content.getvalue()
