from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from command import QUICK, Command
from conftest import MODEL, SIZE, plan_of, small_net
from vitrim.budget.cost import Cost
from vitrim.budget.latency import Timing, TimingError, once, timed
from vitrim.budget.target import Target, TargetError
from vitrim.budget.trim import trim
from vitrim.network import structure
from vitrim.network.survivors import resolve

NET = small_net(dtype=torch.float32)
DESCRIBED = structure(NET)
ATTENTIONS, MLPS = ("blocks.0.attn", "blocks.1.attn"), ("blocks.0.mlp", "blocks.1.mlp")
TIMING = Timing(
    dense_ms=10.0,
    saved={
        **{f"{mlp}.hidden": [((0.5,), 0.1), ((0.75,), 0.08), ((1.0,), 0.0)] for mlp in MLPS},
        **{f"{attn}.heads": [((1 / 3,), 0.2), ((1.0,), 0.0)] for attn in ATTENTIONS},
        **{
            f"{attn}.qk": [
                ((0.5, 0.5), 0.06),
                ((0.5, 1.0), 0.02),
                ((1.0, 0.5), 0.04),
                ((1.0, 1.0), 0.0),
            ]
            for attn in ATTENTIONS
        },
    },
)
"""A table made by hand: an MLP saves at most 0.1, an attention 0.2."""


def ratio(kept: dict[str, list[int]]) -> float:
    return TIMING.ratio(DESCRIBED, resolve(DESCRIBED, plan_of(kept)))


def test_what_is_foretold_between_the_points() -> None:
    assert ratio({}) == 1
    hidden = {"blocks.0.mlp.hidden": [*range(42)]}  # 7/8 of 48
    assert ratio(hidden) == pytest.approx(1 - 0.04)
    dims = [head * 8 + dim for head in range(3) for dim in range(6)]  # 3/4
    assert ratio({"blocks.0.attn.qk": dims}) == pytest.approx(1 - 0.01)
    both = {"blocks.0.attn.qk": dims, "blocks.0.attn.v": dims}
    assert ratio(both) == pytest.approx(1 - 0.03)
    assert ratio({"blocks.1.attn.heads": [0, 1]}) == pytest.approx(1 - 0.1)
    assert ratio({**both, "blocks.0.attn.heads": [0, 1]}) == pytest.approx(1 - 0.1 - 2 / 3 * 0.03)


@pytest.mark.parametrize(("metric", "keep"), [("latency", 0.9), ("latency_ms", 9)])
def test_the_largest_plan_within_a_time(metric: str, keep: float) -> None:
    scores = {f"{mlp}.hidden": torch.arange(48.0) for mlp in MLPS}
    cost = Cost(NET, SIZE, timing=lambda: TIMING)
    keeps = trim(cost, scores, Target(metric=metric, keep=keep), scope="site", round_to=4)
    found = ratio({keep.site: [*keep.index] for keep in keeps})
    assert 0.9 - 0.04 < found <= 0.9
    with pytest.raises(TargetError, match="cannot be reached: this method's sites go down to 800,"):
        trim(cost, scores, Target(metric="latency", keep=0.5))


def test_a_time_that_cannot_be_foretold() -> None:
    cost, aim = Cost(NET, SIZE, timing=lambda: TIMING), Target(metric="latency", keep=0.9)
    with pytest.raises(TargetError, match=r"set method\.even_heads=true"):
        trim(cost, {"blocks.0.attn.qk": torch.ones(24)}, aim)
    with pytest.raises(TimingError, match=r"cutting blocks\.0\.mlp\.input saves is not foretold"):
        trim(cost, {"blocks.0.mlp.input": torch.ones(24)}, aim)
    with pytest.raises(TargetError, match="nothing was measured"):
        trim(Cost(NET, SIZE), {"blocks.0.mlp.hidden": torch.ones(48)}, aim)
    with pytest.raises(TargetError, match=r"target\.latency is for methods that slice"):
        cost.allowed(aim)
    resnet = timm.create_model("resnet10t", pretrained=False)
    with pytest.raises(TimingError, match="nothing in ResNet has a width"):
        timed(resnet, 32, batch=1, repeats=1, device="cpu")


@pytest.mark.parametrize(("metric", "keep"), [("latency", 1.5), ("latency", 0), ("latency_ms", -1)])
def test_a_time_out_of_range_is_refused(metric: str, keep: float) -> None:
    with pytest.raises(TargetError, match=rf"target\.{metric}={keep}: expected .*, above 0"):
        Target(metric=metric, keep=keep)


def test_the_table_of_a_network_has_every_point_of_its_branches() -> None:
    found = timed(small_net(dtype=torch.float32), SIZE, batch=1, repeats=1, device="cpu")
    assert found.dense_ms > 0
    points = {name: [at for at, _ in saved] for name, saved in found.saved.items()}
    for attn, mlp in zip(ATTENTIONS, MLPS, strict=True):
        assert points[f"{mlp}.hidden"] == [(n / 48,) for n in (8, 16, 24, 32, 48)]
        assert points[f"{attn}.heads"] == [(1 / 3,), (2 / 3,), (1.0,)]
        assert points[f"{attn}.qk"] == [(q, v) for q in (0.25, 0.5, 1) for v in (0.25, 0.5, 1)]
    assert all(0 <= gone < 1 for saved in found.saved.values() for _, gone in saved)


def test_a_table_is_measured_once(tmp_path: Path) -> None:
    net, how = small_net(dtype=torch.float32), {"batch": 1, "repeats": 1, "device": "cpu"}
    first = once(tmp_path, net, MODEL, SIZE, **how)
    assert once(tmp_path, net, MODEL, SIZE, **how).dense_ms == first.dense_ms
    once(tmp_path, net, MODEL, SIZE, **{**how, "batch": 2})
    assert len([*tmp_path.glob("latency-*/timing.json")]) == 2


def test_a_run_reaches_a_time(command: Command) -> None:
    words = ["method=oneshot", "data=none", "method.criterion=magnitude", *QUICK]
    words += ["method.compensation=none", "target.latency=0.999"]
    done = command(*words)
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    assert report["foretold"]["latency_ratio"] <= 0.999
    assert report["target"] == {"metric": "latency", "keep": 0.999}
    assert len([*(command.out / "phases").glob("latency-*/timing.json")]) == 1
    refused = command(*words, f"from_run={done.report.parent}")
    assert "times are foretold of dense networks only" in refused.message
