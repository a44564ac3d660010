"""The choices of one network: what each branch may lose, in steps, and what that gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import NamedTuple

from torch import Tensor

from vitrim.budget.trim import in_steps, units_by_head
from vitrim.network.structure import Site


class State(NamedTuple):
    """What remains of a network: units by site, ranks by layer, what is dropped, what is int8."""

    kept: Mapping[str, Tensor]
    ranks: Mapping[str, int]
    dropped: frozenset[str]
    int8: frozenset[str]


class Removal(NamedTuple):
    """Units of a site, or components of a layer, that go together."""

    loss: float
    units: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to treat a branch: what goes at once, and what can go in steps from there.

    Args:
        loss: of what goes at once.
        dropped: the branch, if it goes.
        heads: heads that go.
        ranks: layers in two factors, and their highest rank.
        int8: layers in int8.
        removals: by site or layer, in order.
    """

    loss: float = 0.0
    dropped: str = ""
    heads: frozenset[int] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)
    int8: frozenset[str] = frozenset()
    removals: Mapping[str, Sequence[Removal]] = field(default_factory=dict)


def removals_of(
    site: Site, losses: Tensor, *, gone: frozenset[int], round_to: int, even_heads: bool
) -> list[Removal]:
    """Return the removals of a site in order; of each head, or of the site, the best one stays.

    Args:
        site: of hidden units or of dims of heads.
        losses: of its units, (units,).
        gone: heads that are removed already.
        round_to: units that go together, so that a multiple of it is kept.
        even_heads: whether every head loses as many.
    """
    values = losses.double().tolist()
    steps = [
        [
            Removal(sum(values[unit] for unit in units), tuple(units))
            for units in in_steps(head, values, round_to)
        ]
        for index, head in enumerate(units_by_head(site))
        if index not in gone
    ]
    if even_heads:
        steps = [
            [
                Removal(sum(part.loss for part in level), tuple(chain(*(p.units for p in level))))
                for level in zip(*steps, strict=True)
            ]
        ]
    removals = [removal for of_one in steps for removal in of_one[:-1]]
    return sorted(removals, key=lambda removal: removal.loss / len(removal.units))


def subsets(names: Sequence[str]) -> Iterator[frozenset[str]]:
    """Iterate over all sets of names, the empty one first."""
    for size in range(len(names) + 1):
        for chosen in combinations(names, size):
            yield frozenset(chosen)
