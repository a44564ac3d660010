"""Joint compression: scoring against a forward pass; planning and cutting DeiT-B."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.method.joint.method import Joint
from vitrim.network.surgery import cut
from vitrim.plan import Plan
from vitrim.sensitivity.scorer import LossScorer

from .oneshot import against_limit
from .scoring import DEIT, NETS, against_forward, method_of, net_of
from .timing import Row

LIMIT = 3.5  # passes forward: one of them, and one back
LIMIT_S = 15.0


def rows(repeats: int) -> list[Row]:
    """Return the cost of scoring on two networks, and of planning on the larger."""
    return [*(_scoring(name, repeats) for name in NETS), _planning(DEIT, repeats)]


def _scoring(name: str, repeats: int) -> Row:
    net = net_of(name)
    phase: LossScorer = method_of("joint", name).scorer(net)
    return against_forward("score jointly", name, net, phase.observe, repeats, limit=LIMIT)


def _planning(name: str, repeats: int) -> Row:
    net = net_of(name)
    method: Joint = method_of("joint", name)
    phase = method.scorer(net)
    for seed in range(2):
        torch.manual_seed(seed)
        phase.observe(torch.randn(16, 3, 224, 224))
    phase.scaling = replace(phase.scaling, images=0)
    phase.conclude()
    evidence, cost = phase.evidence(), Cost(net, 224)
    del phase

    def work() -> Any:
        edits = method.plan(net, evidence, cost, Target(metric="macs", keep=0.6)).edits
        plan = Plan(model={}, edits=edits)
        compact: nn.Module = cut(net, plan)
        return method.compensation_of(net, compact, plan, evidence)

    return against_limit("plan and cut DeiT-B jointly", work, LIMIT_S, repeats)
