from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from command import QUICK, Command
from nets import MODEL, SIZE, plan_of, small_net
from vitrim.budget.cost import Cost
from vitrim.budget.latency import (
    LatencyError,
    LatencyGrid,
    LatencyTable,
    load_or_measure,
    measure_table,
)
from vitrim.budget.target import Target, TargetError
from vitrim.budget.trim import trim
from vitrim.errors import ConfigError
from vitrim.network import structure
from vitrim.network.survivors import resolve

NET = small_net(dtype=torch.float32)
DESCRIBED = structure(NET)
ATTENTIONS, MLPS = ("blocks.0.attn", "blocks.1.attn"), ("blocks.0.mlp", "blocks.1.mlp")
GRID = LatencyGrid(mlp=(0.125, 0.25, 0.5, 0.75), dims=(0.25, 0.5), heads=(0.3333, 0.6667))
"""That of conf/run.yaml."""
POINTS = [((0.5,), 0.1), ((0.75,), 0.08), ((1.0,), 0.0)]
TABLE = LatencyTable(
    dense_ms=10.0,
    savings={
        **{f"{mlp}.hidden": POINTS for mlp in MLPS},
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
    return TABLE.ratio(DESCRIBED, resolve(DESCRIBED, plan_of(kept)))


def test_what_is_predicted_between_the_points() -> None:
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
    cost = Cost(NET, SIZE, latency_table=lambda: TABLE)
    keeps = trim(cost, scores, Target(metric=metric, keep=keep), scope="site", round_to=4)
    found = ratio({keep.site: [*keep.index] for keep in keeps})
    assert 0.9 - 0.04 < found <= 0.9
    with pytest.raises(TargetError, match="cannot be reached: this method's sites go down to 800,"):
        trim(cost, scores, Target(metric="latency", keep=0.5))


def test_a_time_that_cannot_be_predicted() -> None:
    cost, aim = Cost(NET, SIZE, latency_table=lambda: TABLE), Target(metric="latency", keep=0.9)
    with pytest.raises(TargetError, match=r"set method\.even_heads=true"):
        trim(cost, {"blocks.0.attn.qk": torch.ones(24)}, aim)
    with pytest.raises(
        LatencyError, match=r"cutting blocks\.0\.mlp\.input saves cannot be predicted"
    ):
        trim(cost, {"blocks.0.mlp.input": torch.ones(24)}, aim)
    with pytest.raises(TargetError, match="no latency was measured"):
        trim(Cost(NET, SIZE), {"blocks.0.mlp.hidden": torch.ones(48)}, aim)
    with pytest.raises(TargetError, match=r"target\.latency is for methods that slice"):
        cost.limit(aim)
    resnet = timm.create_model("resnet10t", pretrained=False)
    with pytest.raises(LatencyError, match="nothing in ResNet has a width"):
        measure_table(resnet, 32, grid=GRID, batch=1, repeats=1, device="cpu")


def test_attentions_that_are_not_in_the_table_save_nothing() -> None:
    described = structure(small_net("beit_base_patch16_224"))
    table = LatencyTable(dense_ms=10.0, savings={f"{mlp}.hidden": POINTS for mlp in MLPS})
    plan = plan_of({"blocks.0.mlp.hidden": range(24)})
    assert table.ratio(described, resolve(described, plan)) == pytest.approx(0.9)
    table.check(described, ["blocks.0.mlp.hidden"])
    for site in ("heads", "v"):
        with pytest.raises(LatencyError, match=rf"cutting blocks\.0\.attn\.{site} saves"):
            table.check(described, [f"blocks.0.attn.{site}"])


@pytest.mark.parametrize(("metric", "keep"), [("latency", 1.5), ("latency", 0), ("latency_ms", -1)])
def test_a_time_out_of_range_is_refused(metric: str, keep: float) -> None:
    with pytest.raises(TargetError, match=rf"target\.{metric}={keep}: expected .*, above 0"):
        Target(metric=metric, keep=keep)


def test_the_table_of_a_network_has_every_point_of_its_branches() -> None:
    found = measure_table(
        small_net(dtype=torch.float32), SIZE, grid=GRID, batch=1, repeats=1, device="cpu"
    )
    assert found.dense_ms > 0
    points = {name: [at for at, _ in saved] for name, saved in found.savings.items()}
    for attn, mlp in zip(ATTENTIONS, MLPS, strict=True):
        assert points[f"{mlp}.hidden"] == [(n / 48,) for n in (8, 16, 24, 32, 48)]
        assert points[f"{attn}.heads"] == [(1 / 3,), (2 / 3,), (1.0,)]
        assert points[f"{attn}.qk"] == [(q, v) for q in (0.25, 0.5, 1) for v in (0.25, 0.5, 1)]
    assert all(0 <= saved < 1 for points in found.savings.values() for _, saved in points)


@pytest.mark.parametrize("wrong", [{"mlp": [1.0]}, {"dims": [0]}, {"heads": ["x"]}], ids=str)
def test_points_out_of_range_are_refused(wrong: dict[str, list[float]]) -> None:
    with pytest.raises(ConfigError, match=r"latency\.table\..*: expected a list of fractions"):
        LatencyGrid(**{"mlp": [0.5], "dims": [0.5], "heads": [0.5], **wrong})


def test_a_table_is_measured_once(tmp_path: Path) -> None:
    net, how = (
        small_net(dtype=torch.float32),
        {"grid": GRID, "batch": 1, "repeats": 1, "device": "cpu"},
    )
    first = load_or_measure(tmp_path, net, MODEL, SIZE, **how)
    assert load_or_measure(tmp_path, net, MODEL, SIZE, **how).dense_ms == first.dense_ms
    load_or_measure(tmp_path, net, MODEL, SIZE, **{**how, "batch": 2})
    assert len([*tmp_path.glob("latency-*/latency_table.json")]) == 2


def test_a_run_reaches_a_time(command: Command) -> None:
    words = ["method=oneshot", "data=none", "method.criterion=magnitude", *QUICK]
    words += ["method.compensation=none", "target.latency=0.999"]
    words.append("latency.repeats=9")  # a median of several: on a busy machine, one is noise
    done = command(*words)
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    assert report["predicted_latency"]["latency_ratio"] <= 0.999
    assert report["target"] == {"metric": "latency", "keep": 0.999}
    assert len([*(command.out / "phases").glob("latency-*/latency_table.json")]) == 1
    refused = command(*words, f"from_run={done.report.parent}")
    assert "latency is predicted for dense networks only" in refused.message
