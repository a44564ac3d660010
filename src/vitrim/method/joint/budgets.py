"""The budgets of a run as numbers: what counts for each, what may remain, and which one binds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitrim.budget.cost import Cost, TimeModel
from vitrim.budget.target import Target, TargetError
from vitrim.budget.trim import time_budget
from vitrim.method.joint.choices import State
from vitrim.method.joint.paths import Floats
from vitrim.network.structure import Structure
from vitrim.network.survivors import dropped_of, propagate, ranks_of, resolve
from vitrim.plan import Edit, Plan


class Budgets:
    """All targets of a run, in the order in which they were given.

    Args:
        cost: the network's closed formula.
        target: what may remain, other targets included.
        scored: the sites whose units are counted as `units`.
        even_heads: whether all heads of an attention have one width, which latencies need.

    Raises:
        TargetError: a target is above what the network has; or a latency cannot be predicted.
    """

    def __init__(
        self, cost: Cost, target: Target, scored: Sequence[str], *, even_heads: bool
    ) -> None:
        self.cost = cost
        self.targets = target.all
        self.scored = scored
        self._tables: dict[int, TimeModel] = {}
        self._parts: dict[str, Structure] = {}
        limits: list[float] = []
        for index, each in enumerate(self.targets):
            if not each.is_time:
                limits.append(cost.limit(each, scored))
                continue
            self._tables[index], fraction = time_budget(
                cost, scored, each, even_heads=even_heads, choice="edits"
            )
            limits.append(min(1.0, fraction))
        self.limits: Floats = np.array(limits, dtype=float)

    def amounts_in(self, branch: str, state: State) -> Floats:
        """Return what a state in which one branch differs has of each budget, (budgets,).

        Only differences of amounts in the same branch have a meaning.
        """
        if self._tables:
            return self.amounts(state)
        if branch not in self._parts:
            self._parts[branch] = _part(self.cost.structure, branch)
        survivors = propagate(self._parts[branch], state.kept)
        amount = self.cost.cost_of(
            survivors,
            [name for name in self.scored if name in survivors],
            state.ranks,
            state.dropped,
            state.int8,
            within=branch,
        )
        return np.array([float(amount.of(target.counted_metric)) for target in self.targets])

    def amounts(self, state: State) -> Floats:
        """Return what a state has of each budget, (budgets,)."""
        survivors = propagate(self.cost.structure, state.kept)
        amount = self.cost.cost_of(survivors, self.scored, state.ranks, state.dropped, state.int8)
        return np.array(
            [
                self._tables[index].ratio(self.cost.structure, survivors)
                if target.is_time
                else float(amount.of(target.counted_metric))
                for index, target in enumerate(self.targets)
            ]
        )

    def of_edits(self, edits: Sequence[Edit]) -> Floats:
        """Return what a plan leaves of each budget, (budgets,)."""
        plan, described = Plan(model={}, edits=tuple(edits)), self.cost.structure
        state = State(
            resolve(described, plan),
            ranks_of(described, plan),
            dropped_of(described, plan),
            frozenset(edit.linear for edit in plan.int8s()),
        )
        return self.amounts(state)

    def binding(self, remaining: Floats) -> str:
        """Return the target that leaves least room, as it was given."""
        room = 1 - remaining / np.maximum(self.limits, 1e-300)
        target = self.targets[int(room.argmin())]
        return f"target.{target.metric}={target.keep}"

    def unreachable(self, least: Floats) -> TargetError:
        """Return the error of budgets that nothing meets, given the least of each, (budgets,)."""
        missed = [
            f"target.{target.metric}={target.keep} cannot be reached: this method's edits go down "
            f"to {low:,.4g}, not to {limit:,.4g}"
            if low > limit
            else f"target.{target.metric}={target.keep} cannot be met together with the others"
            for target, low, limit in zip(self.targets, least, self.limits, strict=True)
        ]
        alone = [message for message in missed if "go down" in message]
        return TargetError("; ".join(alone or missed))


def _part(described: Structure, branch: str) -> Structure:
    """Return the sites, layers and attentions of one branch."""
    layers = tuple(layer for layer in described.layers if layer.branch == branch)
    attentions = tuple(a for a in described.attentions if a.branch == branch)
    names = {part.site for layer in layers for part in (*layer.out, *layer.inp) if part.site}
    names |= {attention.heads for attention in attentions}
    return Structure(
        sites={name: site for name, site in described.sites.items() if name in names},
        branches=tuple(each for each in described.branches if each.name == branch),
        layers=layers,
        attentions=attentions,
    )
