"""From removals in order and a limit to the largest plan that starts from that order.

`vitrim.budget.trim` says how far below the limit that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitrim.network.structure import Structure
from vitrim.network.survivors import Kept, propagate


class Scale(NamedTuple):
    """The whole numbers in which a plan is compared with a target.

    `limit` is what may remain of `total`; `amount` returns what remains with some survivors.
    """

    limit: int
    total: int
    unit: str
    amount: Callable[[Kept], int]


class Removal(NamedTuple):
    """Units of one site that are removed together; removals happen in the order of their keys."""

    key: tuple[float, ...]
    site: str
    units: list[int]
    head: int = 0


def largest(
    described: Structure, removals: Sequence[Removal], n: int, scale: Scale, *, equal_shares: bool
) -> Kept:
    """Return the units kept in the largest plan within the limit that starts from this order.

    Args:
        described: the structure of the network.
        removals: all, in order.
        n: how many of them it takes to meet the limit.
        scale: the limit.
        equal_shares: whether every site loses the same fraction, which the removals' keys begin
            with: then only steps of those that lost most are given back.
    """
    found = _filled(described, removals[:n], scale, equal_shares=equal_shares)
    if equal_shares or found.reached == scale.limit or n == 0:
        return found.kept
    other = _without_the_last(described, removals, n, scale)
    return max(found, other or found, key=lambda survivors: survivors.reached).kept


def _without_the_last(
    described: Structure, removals: Sequence[Removal], n: int, scale: Scale
) -> _Survivors | None:
    """Return what is kept if the last of `n` removals is left out, and smaller steps follow.

    None where that removal costs no more than the one before it of its head: it takes no query-key
    dims along; or where there are no smaller steps that meet the limit.
    """
    chosen, last = [*removals[: n - 1]], removals[n - 1]
    current = _Survivors(described, scale, chosen)
    step = current.reached - current.without(last).reached
    of_head = (r for r in reversed(chosen) if (r.site, r.head) == (last.site, last.head))
    if (previous := next(of_head, None)) is not None:
        plain = current.with_back(previous).reached - current.reached
        if step * len(previous.units) <= plain * len(last.units):
            return None
    for removal in removals[n:]:
        after = current.without(removal)
        if current.reached - after.reached < step:
            current = after
            chosen.append(removal)
        if current.reached <= scale.limit:
            return _filled(described, chosen, scale, equal_shares=False)
    return None


def _filled(
    described: Structure, removals: Sequence[Removal], scale: Scale, *, equal_shares: bool
) -> _Survivors:
    """Return what `removals` leave, with the units that the limit allows to keep as well.

    Removals are undone from the last one on; within a head (within a site, where sites lose the
    same fraction) only after those that followed.
    """
    found = _Survivors(described, scale, removals)
    pending = [*reversed(removals)]
    if equal_shares:
        pending = [removal for removal in pending if removal.key[0] >= pending[0].key[0] - 1e-9]
    while found.reached < scale.limit:
        left, found = _undone(found, pending, by_head=not equal_shares)
        if len(left) == len(pending):
            break
        pending = left
    return found


def _undone(
    found: _Survivors, pending: Sequence[Removal], *, by_head: bool
) -> tuple[list[Removal], _Survivors]:
    """Undo those of `pending` that fit, in that order; return the others and what is kept then.

    A step that does not fit is not tried in other heads of its site, unless it brought back a head.
    """
    left: list[Removal] = []
    blocked: set[tuple[str, int]] = set()
    too_large: set[tuple[str, int]] = set()
    for removal in pending:
        chain = removal.site, removal.head if by_head else 0
        step = removal.site, len(removal.units)
        if chain not in blocked and step not in too_large:
            larger = found.with_back(removal)
            if found.reached < larger.reached <= found.scale.limit:
                found = larger
                continue
            if larger.reached > found.scale.limit and larger.n_heads == found.n_heads:
                too_large.add(step)
        blocked.add(chain)
        left.append(removal)
    return left, found


class _Survivors:
    """The units that are kept, what remains of the target's metric, and the number of heads.

    Args:
        described: the structure of the network.
        scale: what remains is counted in its unit.
        removals: that were made.
        kept: the units at every site that they changed, where these are known.
    """

    def __init__(
        self,
        described: Structure,
        scale: Scale,
        removals: Sequence[Removal] = (),
        kept: Kept | None = None,
    ) -> None:
        self.described = described
        self.scale = scale
        self.kept = units_left(described, removals) if kept is None else kept
        survivors = propagate(described, self.kept)
        self.reached = scale.amount(survivors)
        self.n_heads = sum(len(survivors[attention.heads]) for attention in described.attentions)

    def with_back(self, removal: Removal) -> _Survivors:
        """Return what is kept without that removal."""
        units = torch.cat([self.kept[removal.site], torch.tensor(removal.units)])
        return self._with(removal.site, units.sort().values)

    def without(self, removal: Removal) -> _Survivors:
        """Return what is kept after one more removal."""
        size = self.described.sites[removal.site].size
        units = self.kept.get(removal.site, torch.arange(size))
        return self._with(removal.site, units[~torch.isin(units, torch.tensor(removal.units))])

    def _with(self, site: str, units: Tensor) -> _Survivors:
        return _Survivors(self.described, self.scale, kept={**self.kept, site: units})


def units_left(structure: Structure, removals: Sequence[Removal]) -> Kept:
    """Return the units that `removals` leave at every site that they change."""
    removed: dict[str, list[int]] = {}
    for removal in removals:
        removed.setdefault(removal.site, []).extend(removal.units)
    kept = {}
    for name, units in removed.items():
        is_kept = torch.ones(structure.sites[name].size, dtype=torch.bool)
        is_kept[units] = False
        kept[name] = is_kept.nonzero()[:, 0]
    return kept
