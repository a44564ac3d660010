"""The rank of every layer within a target, from what its components cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.method.mixed_rank.ranks import Allocation, Curve, allocate, least
from vitrim.method.mixed_rank.settings import Rule
from vitrim.network.survivors import propagate

_ALLOCATIONS: Mapping[Rule, Allocation] = {
    "uniform": "uniform",
    "energy": "greedy",
    "error": "hull",
    "loss": "hull",
    "kl": "nested",
}


def ranks_within(
    cost: Cost,
    target: Target,
    losses: Mapping[str, Sequence[float]],
    rule: Rule,
    *,
    max_rank_fraction: float,
    error_exponent: float,
) -> dict[str, int]:
    """Return the rank of every layer that is factorised; the others stay dense.

    Args:
        cost: the network's closed formula.
        target: what may remain.
        losses: what removing each component costs, by layer or piece of a layer.
        rule: how layers are compared.
        max_rank_fraction: see `allocate`; not used by the uniform rule.
        error_exponent: see `allocate`.

    Raises:
        TargetError: rank 1 everywhere leaves more than the target.
    """
    dense = propagate(cost.structure, {})
    metric = target.counted_metric

    def total(ranks: Mapping[str, int]) -> int:
        return cost.cost_of(dense, (), ranks).of(metric)

    dense_total, curves = total({}), {}
    for name, of_layer in losses.items():
        one, two = total({name: 1}), total({name: 2})
        curves[name] = Curve(of_layer, step=two - one, dense=dense_total - one + (two - one))
    constant = dense_total - sum(curve.dense for curve in curves.values())
    limit = cost.limit(target)
    fraction = 1.0 if rule == "uniform" else max_rank_fraction
    lowest = constant + least(curves, fraction)
    if lowest > limit:
        raise TargetError(
            f"target.{target.metric}={target.keep} cannot be reached: rank 1 in every one of "
            f"method.layers leaves {lowest:,} {target.unit}, not {limit:,}"
        )
    return allocate(
        curves,
        limit - constant,
        how=_ALLOCATIONS[rule],
        max_rank_fraction=fraction,
        error_exponent=error_exponent,
    )
