"""One-shot pruning: calibration against a forward pass; ranking, planning and cutting DeiT-B."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from vitrim.method.oneshot import OneShot
from vitrim.plan import Evidence
from vitrim.run import CONF
from vitrim.surgery import cut
from vitrim.target import Cost
from vitrim.trainer.calibrate import Calibrate

from .timing import Row, Side, take_turns

LIMIT_S = 10.0
NETS = {"vit_tiny_patch16_224": 48, "deit_base_patch16_224": 16}


def rows(repeats: int) -> list[Row]:
    """Return the cost of calibration on two networks, and of planning on the larger."""
    found = [_calibration(name, batch, repeats) for name, batch in NETS.items()]
    return [*found, _planning("deit_base_patch16_224", repeats)]


def _method(name: str) -> OneShot:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=["method=oneshot", "model=timm", f"model.name={name}"])
    method: OneShot = instantiate(cfg.method, _convert_="all")
    return method


def _calibration(name: str, batch: int, repeats: int) -> Row:
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    phase = _method(name).scorer(net)
    x = torch.randn(batch, 3, 224, 224)
    sides = {
        "ours": Side(work=lambda _: phase.training_step((x, None), 0)),
        "peer": Side(work=lambda _: _forward(net, x)),
    }
    seconds = take_turns(sides, repeats)
    return Row(
        name=f"calibrate {name.split('_patch')[0]}, batch {batch}",
        peer="the same images through the network",
        ours_s=seconds["ours"],
        peer_s=seconds["peer"],
        kind="cost",
        limit=1.5,
    )


@torch.no_grad()
def _forward(net: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = net(x)
    return logits


def _planning(name: str, repeats: int) -> Row:
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    method = _method(name)
    phase = method.scorer(net)
    phase.sampling = replace(method.sampling, tokens=None)  # more rows than units, as in earnest
    evidence = _evidence(phase)
    cost = Cost(net, 224)

    def work() -> nn.Module:
        plan = method.plan(net, evidence, cost)
        compact = cut(net, plan)
        method.compensation_of(net, compact, plan, evidence)
        return compact

    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the limit is meant on two cores
    try:
        peak = _peak_mib(work)
        seconds = take_turns({"ours": Side(work=lambda _: work())}, max(1, repeats // 3))
    finally:
        torch.set_num_threads(threads)
    return Row(
        name=f"rank, plan, cut, fold DeiT-B on 2 cores (at most +{peak:.0f} MiB)",
        peer=f"a limit of {LIMIT_S:.0f} s",
        ours_s=seconds["ours"],
        peer_s=[LIMIT_S] * len(seconds["ours"]),
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
