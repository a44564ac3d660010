"""From scores and a budget to a plan: the closed formula for costs, the largest plan in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError, is_rate
from vitrim.measure import InputSize, census
from vitrim.model import structure
from vitrim.model.site import (
    Dim,
    Layer,
    Part,
    Site,
    Structure,
    Survivors,
    as_keeps,
    blocks_of,
    dropped_of,
    names_in,
    ranks_of,
    resolve,
    runs_of,
    settle,
    width_of,
)
from vitrim.plan import Keep, Plan
from vitrim.timing import Timing

Metric = Literal["macs", "params", "units", "blocks", "latency", "latency_ms"]
METRICS: tuple[Metric, ...] = ("macs", "params", "units", "blocks", "latency", "latency_ms")
LEVELS = 6
"""Entries in a method's strength table: strengths 0, 1, 2, 3, 4 and 5."""


class TargetError(VitrimError):
    """A budget that is no number in range, or that no plan can reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Keep at most `keep` of `metric`: a fraction in (0, 1], or a whole number of 2 and more.

    With metric blocks, `keep` counts what goes: at most the MACs remain that are left when so many
    of the network's blocks, of mean size, are removed; 1.5 is one and a half. With latency it is a
    share of the dense network's time, with latency_ms that time in milliseconds.
    """

    metric: Metric
    keep: float | int

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise TargetError(f"target.{self.metric}: expected one of {', '.join(METRICS)}")
        if self.metric == "blocks":
            if not is_rate(self.keep) or self.keep == 0:
                raise TargetError(
                    f"target.blocks={self.keep}: expected how many blocks' MACs to remove, above 0"
                )
            return
        if self.is_time:
            share = self.metric == "latency"
            if not is_rate(self.keep) or self.keep == 0 or (share and self.keep > 1):
                raise TargetError(
                    f"target.{self.metric}={self.keep}: expected "
                    f"{'a share up to 1' if share else 'milliseconds'}, above 0"
                )
            return
        whole = is_rate(self.keep) and self.keep >= 2 and self.keep == int(self.keep)
        if whole or (is_rate(self.keep) and 0 < self.keep <= 1):
            return
        raise TargetError(
            f"target.{self.metric}={self.keep}: expected the fraction to keep, above 0 and at most "
            f"1, or the number of {self.metric} to keep, a whole number from 2 on"
        )

    @property
    def is_time(self) -> bool:
        """Whether the budget is a time on this device, which no count can be compared with."""
        return self.metric in ("latency", "latency_ms")

    @property
    def unit(self) -> Literal["macs", "params", "units"]:
        """What is counted to compare with `limit`.

        Raises:
            TargetError: it is a time.
        """
        match self.metric:
            case "blocks":
                return "macs"
            case "latency" | "latency_ms":
                raise TargetError(
                    f"target.{self.metric} is for methods that slice (oneshot, vtp, fskd, cd): "
                    "choose one of them, or target.macs"
                )
            case metric:
                return metric

    @property
    def is_identity(self) -> bool:
        """Whether everything may remain."""
        return self.metric not in ("blocks", "latency_ms") and self.keep == 1

    def limit(self, dense: int) -> int:
        """Return the most that may remain of `dense`.

        Raises:
            TargetError: more is asked for than there is.
        """
        if self.keep > dense:
            raise TargetError(
                f"target.{self.metric}={self.keep}: expected at most the {dense:,} {self.metric} "
                "there are, or the fraction to keep"
            )
        if self.keep > 1:
            return int(self.keep)
        return math.floor(self.keep * dense + 1e-6)  # 0.7 of 10 is 7, whatever 0.7 is in binary


def at_strength(strength: float, levels: Sequence[float]) -> float:
    """Interpolate the six-entry table `levels` at `strength` in 0..5.

    >>> at_strength(2.5, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    0.75
    """
    below = min(int(strength), LEVELS - 2)
    share = strength - below
    return round(levels[below] * (1 - share) + levels[below + 1] * share, 12)


def check_strength(strength: Any, levels: Sequence[float], *, where: str) -> None:
    """Refuse a strength outside 0..5, and a table that is not 1 falling to above 0.

    None stands for no strength, which `choose` accepts beside a target.

    Raises:
        TargetError: naming the value and what is allowed.
    """
    if strength is not None and not (is_rate(strength) and strength <= LEVELS - 1):
        raise TargetError(
            f"strength={strength}: expected a number from 0 to {LEVELS - 1} "
            f"({where} has {LEVELS} levels)"
        )
    falling = all(a > b for a, b in pairwise(levels))
    if len(levels) != LEVELS or levels[0] != 1 or not falling or levels[-1] <= 0:
        raise TargetError(
            f"levels={list(levels)} ({where}): expected {LEVELS} fractions to keep, the first 1, "
            "each below the one before, the last above 0"
        )


def choose(
    strength: float | None, levels: Sequence[float], target: Mapping[str, Any], *, metric: Metric
) -> Target:
    """Return the budget: the one entry of `target` that is set, else `metric` by strength table."""
    given = {name: keep for name, keep in target.items() if keep is not None}
    if len(given) > 1:
        names = ", ".join(f"target.{name}" for name in given)
        raise TargetError(f"{names}: expected at most one target")
    for name, keep in given.items():
        return Target(metric=name, keep=keep)  # type: ignore[arg-type]  # checked there
    if strength is None:
        raise TargetError("strength=null: expected a number from 0 to 5, or one target")
    return Target(metric=metric, keep=at_strength(strength, levels))


class Amount(NamedTuple):
    """What a plan leaves: exact integers, the same that counting the cut network gives."""

    params: int
    macs: int
    units: int


class _Term(NamedTuple):
    branch: str
    params: int
    macs: int
    out: Dim
    layer: Layer | None = None  # whose columns count too


class Cost:
    """The closed formula of one network: params and MACs from the widths that a plan leaves.

    Each Linear is rows x columns weights, or rank x (rows + columns) in two factors, applied at its
    positions. A Conv has a kernel in place of each weight, and of each row where it is depthwise;
    norms make no MACs. Each attention is its context times its query-key and value dims at every
    token; whatever is never cut is a constant. Of a network that was cut before, `origin` is the
    cost of the one that budgets count from. `timing` gives the
    table of times on this device, and measures it when first asked.
    """

    def __init__(
        self,
        net: nn.Module,
        input_size: InputSize,
        origin: Cost | None = None,
        timing: Callable[[], Timing] | None = None,
    ) -> None:
        self.timing = timing
        self.structure: Structure = structure(net)
        self.input_size = input_size
        self._whole = origin or self
        applied = {layer.name: layer.beside or layer.name for layer in self.structure.layers}
        applied |= {attention.qkv: attention.qkv for attention in self.structure.attentions}
        self.dense_count, found = census(net, input_size, [*dict.fromkeys(applied.values())])
        self._positions = positions = {name: found[at] for name, at in applied.items()}
        self._terms = list(_terms(net, self.structure, positions))
        self._params = self._macs = 0
        dense = settle(self.structure, {})
        whole = self.of(dense)
        self._params = self.dense_count.params - whole.params
        self._macs = self.dense_count.macs - whole.macs
        self._own = {
            branch.name: sum(
                tensor.numel()
                for path in branch.modules
                for tensor in net.get_submodule(path).parameters()
            )
            - sum(
                term.params * _weights(term, dense, {})
                for term in self._terms
                if term.branch == branch.name
            )
            for branch in self.structure.branches
        }

    def of(
        self,
        survivors: Survivors,
        scored: Sequence[str] = (),
        ranks: Mapping[str, int] | None = None,
        dropped: Collection[str] = (),
    ) -> Amount:
        """Return what remains; `units` counts the kept units of the sites in `scored`.

        `ranks` holds the layers (or pieces of layers) in two factors, `dropped` the branches that
        are not there any more, with their norms and layer scales.
        """
        params, macs = self._params - sum(self._own[name] for name in dropped), self._macs
        for term in self._terms:
            if term.branch not in dropped:
                weights = _weights(term, survivors, ranks or {})
                params += term.params * weights
                macs += term.macs * weights
        gone = names_in(self.structure, dropped) if dropped else ()
        return Amount(params, macs, sum(len(survivors[s]) for s in scored if s not in gone))

    def allowed(self, target: Target, scored: Sequence[str] = ()) -> int:
        """Return how much of the target's metric may remain.

        Raises:
            TargetError: more is asked for than there is.
        """
        whole = self.whole(target.unit, scored)
        if target.metric != "blocks":
            return target.limit(whole)
        n_blocks, macs = self._whole.blocks()
        if target.keep >= n_blocks:
            raise TargetError(f"target.blocks={target.keep}: the network has {n_blocks} blocks")
        return whole - math.ceil(target.keep * macs / n_blocks - 1e-6)

    def blocks(self) -> tuple[int, int]:
        """Return how many blocks with residual branches there are, and their MACs in all."""
        names = {branch.name for branch in self.structure.branches}
        dense = settle(self.structure, {})
        macs = self.of(dense).macs - self.of(dense, dropped=names).macs
        return len(blocks_of(self.structure)), macs

    def whole(self, metric: Literal["macs", "params", "units"], scored: Sequence[str] = ()) -> int:
        """Return how much of `metric` there is in the network that budgets count from."""
        origin = self._whole
        return int(getattr(origin.of(settle(origin.structure, {}), scored), metric))

    def plan(self, plan: Plan, scored: Sequence[str] = ()) -> Amount:
        """Return what a plan leaves; `units` counts the kept units of the sites in `scored`."""
        ranks = ranks_of(self.structure, plan)
        return self.of(
            resolve(self.structure, plan), scored, ranks, dropped_of(self.structure, plan)
        )

    def positions(self, layer: str) -> int:
        """Return at how many positions of one image a layer is applied."""
        return self._positions[layer]

    def attended(self, plan: Plan) -> Iterator[tuple[int, int, int, int]]:
        """Iterate over the attentions: tokens, tokens attended to, heads left, q-k and v dims."""
        left, dropped = resolve(self.structure, plan), dropped_of(self.structure, plan)
        for attention in self.structure.attentions:
            if attention.branch in dropped:
                continue
            tokens = self._positions[attention.qkv]
            dims = len(left[attention.qk]) + len(left[attention.v])
            yield tokens, attention.context or tokens, len(left[attention.heads]), dims


def _weights(term: _Term, survivors: Survivors, ranks: Mapping[str, int]) -> int:
    """Return how many weights a layer has left."""
    if term.layer is None:
        return width_of(term.out, survivors)
    columns = width_of(term.layer.inp, survivors)
    runs, total = {term.layer.name: term.out}, 0
    if ranks and term.layer.pieces:
        pieces = runs_of(term.layer)
        del pieces[term.layer.name]
        runs = runs if ranks.keys().isdisjoint(pieces) else pieces
    for name, out in runs.items():
        rows = width_of(out, survivors)
        total += ranks[name] * (rows + columns) if name in ranks else rows * columns
    return total


def _terms(net: nn.Module, described: Structure, positions: Mapping[str, int]) -> Iterator[_Term]:
    for layer in described.layers:
        name = layer.name
        weight = net.get_parameter(f"{name}.weight")
        area = math.prod(weight.shape[2 if layer.inp else 1 :])
        macs = area * positions[name] if weight.ndim > 1 else 0
        yield _Term(layer.branch, area, macs, layer.out, layer if layer.inp else None)
        if net.get_submodule(name).bias is not None:
            yield _Term(layer.branch, 1, 0, layer.out)
    for table in described.tables:
        units = Part(site=table.site, offset=0, size=described.sites[table.site].size)
        yield _Term(table.branch, net.get_parameter(table.name).numel() // units.size, 0, (units,))
    dims = {part.site: part for layer in described.layers for part in (*layer.out, *layer.inp)}
    for attention in described.attentions:
        tokens = positions[attention.qkv]
        context = attention.context or tokens
        for site in (attention.qk, attention.v):
            yield _Term(attention.branch, 0, tokens * context, (dims[site],))


Scope = Literal["global", "site"]


def trim(
    cost: Cost,
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    scope: Scope = "global",
    round_to: int = 1,
    even_heads: bool = False,
    pace: Mapping[str, float] | None = None,
) -> tuple[Keep, ...]:
    """Remove the least important units until `target` is met, and not one more.

    Units are ranked by score over all sites (`scope="global"`), or by rank within their own site so
    that every site loses the same share (`scope="site"`). Ties go to the lower index. Widths (of a
    head, where the site has heads) shrink to multiples of `round_to`. The best unit of a site
    stays.

    Args:
        cost: the dense network's closed formula.
        scores: site name -> importance, higher is kept, shape (size,), finite.
        target: the budget; what is reached is at most it, and less than one step's cost below it.
        scope: how sites are compared.
        round_to: units removed in one step.
        even_heads: take as many dims from every head of a site, so that its heads stay equal.
        pace: site name -> how much of a share it loses, with `scope="site"`, while others lose 1.

    Raises:
        TargetError: a score is not finite, or the budget is below what the sites can give up.
    """
    steps = _steps(cost.structure, scores, scope, round_to, pace or {}, even_heads=even_heads)
    limit, most, left = _scale(cost, [*scores], target, even_heads=even_heads)

    def reached(n: int) -> int:
        return left(settle(cost.structure, _kept(cost.structure, steps, n)))

    least = reached(len(steps))
    if least > limit:
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: this method's sites go down "
            f"to {least:,} of {most:,} {'ppm of the time' if target.is_time else target.unit} "
            f"({least / most:.4f}), not to {limit:,}"
        )
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) <= limit else (middle + 1, high)
    kept = _kept(cost.structure, steps, low)
    return as_keeps(cost.structure, settle(cost.structure, kept), kept)


def _scale(
    cost: Cost, scored: Sequence[str], target: Target, *, even_heads: bool
) -> tuple[int, int, Callable[[Survivors], int]]:
    """Return the limit, what the dense network has, and what is left of it by what survives.

    Times are in millionths of the dense network's.
    """
    if not target.is_time:
        unit = target.unit
        return (
            cost.allowed(target, scored),
            cost.whole(unit, scored),
            lambda left: int(getattr(cost.of(left, scored), unit)),
        )
    described = cost.structure
    if not even_heads and any(described.sites[name].head_dims for name in scored):
        raise TargetError(
            f"target.{target.metric}: heads of unequal width take longer than can be foretold: set "
            "method.even_heads=true, or choose other sites"
        )
    if cost.timing is None:
        raise TargetError(f"target.{target.metric}: nothing was measured on this device")
    timing = cost.timing()
    timing.check(described, scored)
    share = target.keep if target.metric == "latency" else target.keep / timing.dense_ms
    limit = min(math.floor(1e6 * share), 10**6)
    return limit, 10**6, lambda left: math.ceil(1e6 * timing.ratio(described, left))


class _Step(NamedTuple):
    key: tuple[float, ...]
    site: str
    units: list[int]


def _steps(
    described: Structure,
    scores: Mapping[str, Tensor],
    scope: Scope,
    round_to: int,
    pace: Mapping[str, float],
    *,
    even_heads: bool,
) -> list[_Step]:
    """Return every removal that may happen, in order, the last one of each site excepted."""
    steps: list[_Step] = []
    anchors = _anchors(described, scores)
    for order, (name, score) in enumerate(scores.items()):
        site = described.sites.get(name)
        if site is None or site.locked:
            reason = "there is no such site" if site is None else site.locked
            raise TargetError(f"site {name!r} cannot be cut: {reason}")
        if even_heads and len(set(site.head_dims)) > 1:
            raise TargetError(f"site {name!r}: even_heads needs heads of one width")
        if score.shape != (site.size,) or not bool(torch.isfinite(score).all()):
            raise TargetError(f"site {name!r}: expected {site.size} finite scores")
        values = score.double().tolist()
        chunks = [list(_chunks(head, values, round_to)) for head in _heads(site)]
        if even_heads:
            chunks = [[_joined(level) for level in zip(*chunks, strict=True)]]
        found = sorted(
            _Step((value, -max(units) / site.size, order), name, units)
            for head in chunks
            for value, units in head
        )
        if not found:
            continue  # an already cut network may have no query-key dims left to give
        held = [at for at, step in enumerate(found) if _is_anchored(step, site, anchors)]
        del found[held[-1] if held else -1]
        if scope == "site":
            whole = site.size * pace.get(name, 1.0)
            gone = list(accumulate(len(step.units) / whole for step in found))
            found = [
                step._replace(key=(share, order, rank))
                for rank, (share, step) in enumerate(zip(gone, found, strict=True))
            ]
        steps += found
    return sorted(steps)


def _anchors(described: Structure, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Return, for the dims of attentions whose heads are scored too, the best head: it stays."""
    return {
        dims: int(scores[attention.heads].argmax())
        for attention in described.attentions
        for dims in (attention.qk, attention.v)
        if attention.heads in scores
    }


def _is_anchored(step: _Step, site: Site, anchors: Mapping[str, int]) -> bool:
    """Whether the step takes units that the last head to stay could not do without."""
    if site.name not in anchors:
        return True
    anchor = _heads(site)[anchors[site.name]]
    return any(unit in anchor for unit in step.units)


def _heads(site: Site) -> list[range]:
    """Return the units of each head, or all units together where the site has no heads."""
    ends = list(accumulate(site.head_dims or (site.size,), initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


def _chunks(
    units: Sequence[int], values: Sequence[float], round_to: int
) -> Iterator[tuple[float, list[int]]]:
    """Group units, worst first, so that whatever remains is a multiple of `round_to`."""
    ranked = sorted(units, key=lambda unit: (values[unit], -unit))
    first = len(ranked) % round_to or round_to
    for start, stop in pairwise([0, *range(first, len(ranked) + 1, round_to)]):
        chunk = ranked[start:stop]
        yield _mean([values[unit] for unit in chunk]), chunk


def _mean(values: Sequence[float]) -> float:
    """Return the mean, which of equal numbers is that very number: ties hang on it."""
    return values[0] + math.fsum(value - values[0] for value in values) / len(values)


def _joined(level: Sequence[tuple[float, list[int]]]) -> tuple[float, list[int]]:
    """Return one step that takes the same number of units from every head."""
    units = [unit for _, chunk in level for unit in chunk]
    return _mean([value for value, _ in level]), units


def _kept(structure: Structure, steps: Sequence[_Step], n: int) -> dict[str, Tensor]:
    """Return what the first `n` steps leave at every site that they touch."""
    gone: dict[str, list[int]] = {}
    for step in steps[:n]:
        gone.setdefault(step.site, []).extend(step.units)
    kept = {}
    for name, units in gone.items():
        stays = torch.ones(structure.sites[name].size, dtype=torch.bool)
        stays[units] = False
        kept[name] = stays.nonzero()[:, 0]
    return kept
