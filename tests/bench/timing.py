"""Let several pieces of work take turns, and put the ratios of their times in a table."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One competitor: `work` is timed, and is given what `prepare` made before that."""

    work: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison: the seconds of each turn, ours and the peer's.

    The ratio is peer / ours where it is about being faster, and its bar, `limit`, the least it
    should be; it is ours / peer where it is about what something costs, and its bar the most.
    `note` stands where no bar is.
    """

    name: str
    peer: str
    ours_s: Sequence[float]
    peer_s: Sequence[float]
    kind: Literal["faster", "cost"]
    limit: float | None = None
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """The ratio of every turn."""
        pairs = zip(self.ours_s, self.peer_s, strict=True)
        return [p / o if self.kind == "faster" else o / p for o, p in pairs]

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        ratio = statistics.median(self.ratios)
        bar, met = self.note or "information", ""
        if self.limit is not None:
            faster = self.kind == "faster"
            bar = f"{'>=' if faster else '<='} {self.limit:.2f}"
            met = "yes" if (ratio >= self.limit if faster else ratio <= self.limit) else "NO"
        return (
            self.name,
            _ms(self.ours_s),
            self.peer,
            _ms(self.peer_s),
            f"{ratio:.2f}",
            f"{min(self.ratios):.2f}-{max(self.ratios):.2f}",
            bar,
            met,
        )


def take_turns(sides: Mapping[str, Side], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each turn by side, after one untimed round.

    The order is reversed from round to round, and garbage is collected before each turn, so that no
    side pays for what another one left behind.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in reversed(sides.items()) if turn % 2 else sides.items():
            given = side.prepare()
            gc.collect()
            start = time.perf_counter()
            result = side.work(given)
            elapsed = time.perf_counter() - start
            del given, result
            if turn:
                seconds[name].append(elapsed)
    return seconds


def table(rows: Iterable[Row], title: str) -> Table:
    """Return the rows as a table; times are medians in milliseconds."""
    columns = ("name", "ours ms", "peer", "peer ms", "ratio", "min-max", "bar", "met")
    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*row.cells())
    return shown


def _ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):,.1f}"
