"""Joint compression: scoring against a forward pass; planning and cutting DeiT-B."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.method.joint.method import Joint
from vitrim.method.joint.scorer import JointScorer
from vitrim.network.surgery import cut
from vitrim.plan import Plan

from .oneshot import peak_mib
from .scoring import DEIT, NETS, against_forward, method_of, net_of
from .timing import Row, Side, take_turns

LIMIT = 3.5  # passes forward: one of them, and one back
LIMIT_S = 15.0


def rows(repeats: int) -> list[Row]:
    """Return the cost of scoring on two networks, and of planning on the larger."""
    return [*(_scoring(name, repeats) for name in NETS), _planning(DEIT, repeats)]


def _scoring(name: str, repeats: int) -> Row:
    net = net_of(name)
    phase: JointScorer = method_of("joint", name).scorer(net)
    return against_forward("score jointly", name, net, phase.observe, repeats, limit=LIMIT)


def _planning(name: str, repeats: int) -> Row:
    net = net_of(name)
    method: Joint = method_of("joint", name)
    phase = method.scorer(net)
    for seed in range(2):
        torch.manual_seed(seed)
        phase.observe(torch.randn(16, 3, 224, 224))
    phase.scaling = type(phase.scaling)(images=0, shares=phase.scaling.shares)
    phase.conclude()
    evidence, cost = phase.evidence(), Cost(net, 224)
    del phase

    def work() -> Any:
        edits = method.plan(net, evidence, cost, Target(metric="macs", keep=0.6)).edits
        plan = Plan(model={}, edits=edits)
        compact: nn.Module = cut(net, plan)
        return method.compensation_of(net, compact, plan, evidence)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the limit is meant on two cores
    try:
        peak = peak_mib(work)
        seconds = take_turns({"ours": Side(work=lambda _: work())}, max(1, repeats // 3))
    finally:
        torch.set_num_threads(threads)
    return Row(
        name=f"plan and cut DeiT-B jointly on 2 cores (at most +{peak:.0f} MiB)",
        peer=f"a limit of {LIMIT_S:.0f} s",
        ours_s=seconds["ours"],
        peer_s=[LIMIT_S] * len(seconds["ours"]),
        kind="cost",
        limit=1.0,
    )
