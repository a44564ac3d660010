"""One-shot pruning: calibration against a forward pass; ranking, planning and cutting DeiT-B."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import resolve_target
from vitrim.method.oneshot import OneShot
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Plan
from vitrim.trainer.calibrate import Calibrate

from .scoring import DEIT, NETS, against_forward, method_of, net_of
from .timing import Row, Side, take_turns

LIMIT_S = 10.0


def rows(repeats: int) -> list[Row]:
    """Return the cost of calibration on two networks, and of planning on the larger."""
    found = [_calibration(name, repeats) for name in NETS]
    return [*found, _planning(DEIT, repeats)]


def _calibration(name: str, repeats: int) -> Row:
    net = net_of(name)
    phase = method_of("oneshot", name).scorer(net)
    return against_forward(
        "calibrate", name, net, lambda x: phase.training_step((x, None), 0), repeats
    )


def _planning(name: str, repeats: int) -> Row:
    net = net_of(name)
    method: OneShot = method_of("oneshot", name)
    phase = method.scorer(net)
    phase.sampling = replace(method.sampling, tokens=None)  # more rows than units, as in earnest
    evidence = _evidence(phase)
    cost = Cost(net, 224)
    target = resolve_target(
        3, {}, levels=method.levels, metric=method.metric, where="conf/method/oneshot.yaml"
    )

    def work() -> nn.Module:
        plan = Plan(model={}, edits=method.plan(net, evidence, cost, target).edits)
        compact = cut(net, plan)
        method.compensation_of(net, compact, plan, evidence)
        return compact

    return against_limit("rank, plan, cut, fold DeiT-B", work, LIMIT_S, repeats)


def against_limit(what: str, work: Callable[[], Any], limit_s: float, repeats: int) -> Row:
    """Return the time of `work` on two cores, on which the limit is meant, over the limit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        peak = _peak_mib(work)
        seconds = take_turns({"ours": Side(work=lambda _: work())}, max(1, repeats // 3))
    finally:
        torch.set_num_threads(threads)
    return Row(
        name=f"{what} on 2 cores (at most +{peak:.0f} MiB)",
        peer=f"a limit of {limit_s:.0f} s",
        ours_s=seconds["ours"],
        peer_s=[limit_s] * len(seconds["ours"]),
        kind="cost",
        limit=1.0,
    )


def _evidence(phase: Calibrate) -> Evidence:
    phase.on_train_start()
    for seed in range(2):
        torch.manual_seed(seed)
        phase.training_step((torch.randn(16, 3, 224, 224), None), seed)
    phase.on_train_end()
    return phase.evidence()


def _peak_mib(work: Callable[[], Any]) -> float:
    """Return by how much the process grew at most while `work` ran, in MiB."""
    done, seen, before = threading.Event(), [0], _resident()

    def watch() -> None:
        while not done.wait(0.002):
            seen[0] = max(seen[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return (seen[0] - before) / 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
