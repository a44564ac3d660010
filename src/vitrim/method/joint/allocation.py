"""From losses and budgets to edits: what each branch loses, on one scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vitrim.method.joint.choices import Option, Removal, State, removals_of, subsets
from vitrim.method.joint.paths import (
    Floats,
    Found,
    Indices,
    Path,
    Steps,
    best_within,
    first_within,
)
from vitrim.network.structure import Layer, Structure, blocks_of
from vitrim.network.survivors import head_of
from vitrim.plan import Drop, Edit, Int8, Keep, LowRank

_PRICES = 64  # tried on what is saved, from one at which nothing goes to one at which all goes


class Amounts(Protocol):
    """What counts for each budget."""

    def amounts(self, state: State) -> Floats:
        """Return what remains of a network, (budgets,)."""
        ...

    def amounts_in(self, branch: str, state: State) -> Floats:
        """Return it for networks that differ in one branch, up to a constant, (budgets,)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What removing anything costs, on one scale.

    Args:
        units: by site, (units,); lower goes first.
        components: by layer of which ranks may fall, (components,), the best first.
        branches: by branch, and by block of several branches.
        int8: by layer.
    """

    units: Mapping[str, Tensor] = field(default_factory=dict)
    components: Mapping[str, Tensor] = field(default_factory=dict)
    branches: Mapping[str, float] = field(default_factory=dict)
    int8: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How removals are made: see conf/method/joint.yaml."""

    round_to: int
    even_heads: bool
    heads: bool
    max_rank_fraction: float


class UnreachableError(Exception):
    """No plan meets all budgets; `least` is what remains of each at least, (budgets,)."""

    def __init__(self, least: Floats) -> None:
        super().__init__("no plan meets all budgets")
        self.least = least


class Allocated(NamedTuple):
    """The edits within a budget, what they are predicted to cost, and what remains, (budgets,)."""

    edits: tuple[Edit, ...]
    loss: float
    remaining: Floats


class _Priced(NamedTuple):
    """An option, what it saves at once (budgets,), and its steps."""

    option: Option
    saved: Floats
    steps: Sequence[Steps]


def allocate(
    described: Structure, losses: Losses, amounts: Amounts, limits: Floats, how: Limits
) -> Allocated:
    """Return the edits that are predicted to lose least within all budgets.

    Args:
        described: the network's structure.
        losses: of everything that may go.
        amounts: count for each budget.
        limits: of each budget, (budgets,).
        how: removals are made.

    Raises:
        UnreachableError: no edits meet all budgets.
    """
    nothing = State({}, {}, frozenset(), frozenset())
    dense = amounts.amounts(nothing)
    branches = {}
    for branch, options in _options(described, losses, how).items():
        of_branch = partial(amounts.amounts_in, branch)
        whole = of_branch(nothing)
        branches[branch] = [_priced(described, option, of_branch, whole) for option in options]
    weights = _weights(dense)
    prices = _prices(branches, weights)
    best: tuple[Found, Sequence[_Priced]] | None = None
    for chosen, loss in _configurations(described, losses, branches, prices):
        saved = sum((priced.saved for priced in chosen), np.zeros(len(dense)))
        path = Path(loss, dense - saved, [steps for priced in chosen for steps in priced.steps])
        for weight in weights:
            found = first_within(path, limits, weight)
            if found is not None and (best is None or found.loss < best[0].loss):
                best = found, chosen
    if best is None:
        most = sum((_most_saved(options) for options in branches.values()), np.zeros(len(dense)))
        raise UnreachableError(dense - most)
    found, of_best = best
    return Allocated(_edits(described, of_best, found.counts), found.loss, found.remaining)


def _options(described: Structure, losses: Losses, how: Limits) -> dict[str, list[Option]]:
    """Return the ways to treat each branch and each layer outside of branches, the dense first."""
    names = dict.fromkeys(layer.branch for layer in described.layers)
    found = {name: [*_branch_options(described, losses, how, name)] for name in names}
    inside = {layer.name for layer in described.layers}
    for layer, loss in losses.int8.items():
        if layer not in inside:
            found[layer] = [Option(), Option(loss=loss, int8=frozenset([layer]))]
    return found


def _branch_options(
    described: Structure, losses: Losses, how: Limits, branch: str
) -> Iterator[Option]:
    layers = [layer for layer in described.layers if layer.branch == branch]
    int8 = [layer.name for layer in layers if layer.name in losses.int8]
    for chosen in subsets(int8):
        loss = sum(losses.int8[name] for name in chosen)
        for option in _sliced(described, losses, how, layers):
            yield replace(option, loss=option.loss + loss, int8=chosen)
        for option in _ranked(losses, how, layers):
            yield replace(option, loss=option.loss + loss, int8=chosen)
    if branch in losses.branches:
        yield Option(loss=losses.branches[branch], dropped=branch)


def _sliced(
    described: Structure, losses: Losses, how: Limits, layers: Sequence[Layer]
) -> Iterator[Option]:
    """Iterate over the options in which heads go, none first, and then units."""
    names = {p.site for layer in layers for p in (*layer.out, *layer.inp) if p.site}
    sites = [described.sites[name] for name in names if name in losses.units]
    sites.sort(key=lambda site: site.name)
    v = next((site for site in sites if site.kind == "v"), None)
    heads: list[int] = []
    of_heads = torch.zeros(0)
    if v is not None and how.heads:
        of_heads = torch.zeros(len(v.head_dims), dtype=torch.float64)
        of_heads.index_add_(0, head_of(v), losses.units[v.name].double())
        heads = of_heads.argsort(stable=True).tolist()[:-1]
    for n in range(len(heads) + 1):
        gone = frozenset(heads[:n])
        yield Option(
            loss=float(of_heads[heads[:n]].sum()) if n else 0.0,
            heads=gone,
            removals={
                site.name: removals_of(
                    site,
                    losses.units[site.name],
                    gone=gone,
                    round_to=how.round_to,
                    even_heads=how.even_heads,
                )
                for site in sites
            },
        )


def _ranked(losses: Losses, how: Limits, layers: Sequence[Layer]) -> Iterator[Option]:
    """Iterate over the options in which some layers are in two factors, of falling ranks."""
    highest = {}
    for layer in layers:
        if layer.name in losses.components:
            rows, columns = (sum(part.size for part in dim) for dim in (layer.out, layer.inp))
            break_even = (rows * columns - 1) // (rows + columns)
            rank = int(how.max_rank_fraction * break_even)
            if rank >= 1:
                highest[layer.name] = rank
    for chosen in subsets([*highest]):
        if not chosen:
            continue
        tails = {name: losses.components[name].double() for name in chosen}
        yield Option(
            loss=float(sum(tails[name][highest[name] :].sum() for name in chosen)),
            ranks={name: highest[name] for name in sorted(chosen)},
            removals={
                name: [
                    Removal(float(tails[name][rank - 1]), (rank - 1,))
                    for rank in range(highest[name], 1, -1)
                ]
                for name in sorted(chosen)
            },
        )


def _priced(
    described: Structure, option: Option, amounts: Callable[[State], Floats], dense: Floats
) -> _Priced:
    start = _state(described, option, {})
    base = dense if option == Option() else amounts(start)
    steps = []
    for name, removals in option.removals.items():
        if not removals:
            continue

        def saved_after(n: int, name: str = name) -> Floats:
            return base - amounts(_state(described, option, {name: n}))

        savings = _savings(removals, saved_after)
        steps.append(Steps(name, np.array([removal.loss for removal in removals]), savings))
    return _Priced(option, dense - base, steps)


def _savings(removals: Sequence[Removal], saved_after: Callable[[int], Floats]) -> Floats:
    """Return what each removal saves, (removals, budgets).

    Each unit saves the same of what is counted. Latencies are interpolated between nine points.
    """
    sizes = np.array([len(removal.units) for removal in removals], dtype=float)
    one, everything = saved_after(1), saved_after(len(removals))
    unit = one / sizes[0]
    if np.allclose(unit * sizes.sum(), everything, rtol=1e-9, atol=1e-12):
        linear: Floats = sizes[:, None] * unit[None]
        return linear
    counts = np.unique(np.linspace(0, len(removals), 9).round().astype(int))
    points = np.stack([saved_after(int(n)) if n else np.zeros_like(one) for n in counts])
    at = np.arange(len(removals) + 1)
    totals = np.stack([np.interp(at, counts, column) for column in points.T], axis=1)
    savings: Floats = np.diff(totals, axis=0).clip(min=0.0)
    return savings


def _state(described: Structure, option: Option, counts: Mapping[str, int]) -> State:
    """Return what remains if one branch is treated in this way, and all others stay."""
    kept, ranks = _left(described, option, counts)
    dropped = frozenset([option.dropped]) if option.dropped else frozenset()
    return State(kept, ranks, dropped, option.int8)


def _left(
    described: Structure, option: Option, counts: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    kept: dict[str, Tensor] = {}
    ranks = dict(option.ranks)
    for name, removals in option.removals.items():
        n = counts.get(name, 0)
        if name in ranks:
            ranks[name] -= n
            continue
        site = described.sites[name]
        is_kept = torch.ones(site.size, dtype=torch.bool)
        if option.heads and site.head_dims:
            is_kept &= ~torch.isin(head_of(site), torch.tensor([*option.heads]))
        for removal in removals[:n]:
            is_kept[list(removal.units)] = False
        if not bool(is_kept.all()):
            kept[name] = is_kept.nonzero()[:, 0]
    return kept, ranks


def _most_saved(options: Sequence[_Priced]) -> Floats:
    """Return the most that a branch gives back of each budget, (budgets,)."""
    saved = [
        priced.saved + sum((steps.savings.sum(0) for steps in priced.steps), np.zeros(1))
        for priced in options
    ]
    most: Floats = np.max(saved, axis=0)
    return most


def _weights(dense: Floats) -> list[Floats]:
    """Return the weights of what is saved, (budgets,): in units of the dense network's."""
    shares = [(1.0,)] if len(dense) == 1 else [(x, 1 - x) for x in np.linspace(0, 1, 9)]
    return [np.array(share) / dense for share in shares]


def _prices(branches: Mapping[str, Sequence[_Priced]], weights: Sequence[Floats]) -> Floats:
    """Return prices of what is saved, (prices, budgets)."""
    slopes = [
        loss / saved
        for options in branches.values()
        for priced in options
        for losses, savings in (
            (np.array([priced.option.loss]), priced.saved[None]),
            *((steps.losses, steps.savings) for steps in priced.steps),
        )
        for loss, saved in zip(losses, savings @ weights[len(weights) // 2], strict=True)
        if loss > 0 and saved > 0
    ]
    low, high = (min(slopes), max(slopes)) if slopes else (1.0, 1.0)
    levels = np.concatenate([[0.0], np.geomspace(low / 2, high * 2, _PRICES)])
    return np.concatenate([levels[:, None] * weight[None] for weight in weights])


def _configurations(
    described: Structure,
    losses: Losses,
    branches: Mapping[str, Sequence[_Priced]],
    prices: Floats,
) -> Iterator[tuple[list[_Priced], float]]:
    """Iterate over the options of all branches that some price makes best, and their loss."""
    values = {
        name: np.stack([_value(priced, prices) for priced in options])
        for name, options in branches.items()
    }
    chosen = {name: of_branch.argmin(0) for name, of_branch in values.items()}
    extra = np.zeros(len(prices))
    for block, names in blocks_of(described).items():
        if len(names) == 2 and block in losses.branches and {*names} <= losses.branches.keys():
            more = losses.branches[block] - sum(losses.branches[name] for name in names)
            extra += more * _together(values, chosen, names, more)
    seen: set[tuple[int, ...]] = set()
    for price in range(len(prices)):
        key = tuple(int(of_branch[price]) for of_branch in chosen.values())
        if key not in seen:
            seen.add(key)
            options = [branches[name][index] for name, index in zip(chosen, key, strict=True)]
            yield options, sum(priced.option.loss for priced in options) + float(extra[price])


def _value(priced: _Priced, prices: Floats) -> Floats:
    """Return the least loss of an option minus the price of what it saves, (prices,)."""
    value: Floats = priced.option.loss - prices @ priced.saved
    for steps in priced.steps:
        value = value + best_within(steps, prices)
    return value


def _together(
    values: Mapping[str, Floats], chosen: dict[str, Indices], names: Sequence[str], more: float
) -> Floats:
    """Choose for both branches of a block together, in place; return 1 where both are dropped.

    A branch's last option is to drop it; dropping both costs `more` than their sum.
    """
    first, second = (values[name] for name in names)
    kept = [(of_branch[:-1].argmin(0), of_branch[:-1].min(0)) for of_branch in (first, second)]
    pairs = np.stack(
        [
            kept[0][1] + kept[1][1],
            first[-1] + kept[1][1],
            kept[0][1] + second[-1],
            first[-1] + second[-1] + more,
        ]
    ).argmin(0)
    for name, (index, _), of_branch, drops in (
        (names[0], kept[0], first, (1, 3)),
        (names[1], kept[1], second, (2, 3)),
    ):
        chosen[name] = np.where(np.isin(pairs, drops), len(of_branch) - 1, index)
    both: Floats = (pairs == 3).astype(float)
    return both


def _edits(
    described: Structure, chosen: Sequence[_Priced], counts: Mapping[str, int]
) -> tuple[Edit, ...]:
    """Return the edits that lead to what is chosen, in the order of the network."""
    keeps: dict[str, Keep] = {}
    others: list[Edit] = []
    for priced in chosen:
        option = priced.option
        kept, ranks = _left(described, option, counts)
        keeps |= {
            name: Keep(site=name, index=tuple(units.tolist())) for name, units in kept.items()
        }
        others += [LowRank(linear=name, rank=rank) for name, rank in ranks.items()]
        others += [Drop(branch=option.dropped)] if option.dropped else []
        others += [Int8(linear=name) for name in sorted(option.int8)]
    return (*(keeps[name] for name in described.sites if name in keeps), *others)
