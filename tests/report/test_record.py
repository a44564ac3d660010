"""The numbers of report.json: both sides, the stages, what was kept."""

from __future__ import annotations

import pytest

from nets import SIZE, plan_of, skeleton_net, small_net
from vitrim import Plan, count, cut
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.measure import Count, Latency
from vitrim.report.record import record

CUT = plan_of({"blocks.0.attn.qk": (0, 1, 9), "blocks.1.attn.v": (1, 2, 3, 20)})
TARGET = Target(metric="macs", keep=0.9)


def measured() -> tuple[Cost, Count, Count]:
    """Return the cost of a dense network, its count and that of the compact one."""
    dense = small_net()
    return Cost(dense, SIZE), count(dense, SIZE), count(cut(dense, CUT), SIZE)


def test_a_record_holds_both_sides_and_what_was_kept() -> None:
    cost, dense, compact = measured()
    dense_accuracy = {"top1": 90.0, "top5": 99.0}
    stages = {"cut": None, "refit": {"top1": 80.0, "top5": 98.0}}
    times = [Latency(2.0, 2.1, 0.1), Latency(1.0, 1.1, 0.1, {"blocks.0": Latency(0.4, 0.5, 0.2)})]
    report = record(cost, compact, CUT, times, dense_accuracy, stages, TARGET)
    for side, size, top1, latency in (
        ("dense", dense, 90.0, 2.0),
        ("compact", compact, 80.0, 1.0),
    ):
        expected = {**size._asdict(), "top1": top1, "latency_ms": latency}
        assert report[side] == {**report[side], **expected}
        assert "flops_blog" not in report[side]
    assert "blocks_ms" not in report["dense"]
    assert report["compact"]["blocks_ms"] == {"blocks.0": [0.5, 0.2]}
    assert (report["dense"]["latency_mean_ms"], report["dense"]["latency_std_ms"]) == (2.1, 0.1)
    assert report["cut"] == {"top1": None, "top5": None}
    assert report["stages"] == {"cut": report["cut"], "refit": {"top1": 80.0, "top5": 98.0}}
    assert report["kept"]["macs"] == compact.macs / dense.macs
    assert report["kept"]["params"] == compact.params / dense.params
    assert report["target"] == {"metric": "macs", "keep": 0.9}
    assert report["compact"]["mb"] == cost.plan(CUT).size_bytes / 1e6
    sizes = [report[side]["mb"] for side in ("compact", "dense")]
    assert report["kept"]["mb"] == pytest.approx(sizes[0] / sizes[1])
    assert sizes[0] < sizes[1]


def test_a_record_is_refused_where_formula_and_counter_disagree() -> None:
    cost, _, compact = measured()
    times = [Latency(1.0, 1.0, 0.0)] * 2
    with pytest.raises(AssertionError, match="formula"):
        record(cost, compact, plan_of({}), times, None, {"cut": None}, TARGET)


def test_a_record_has_the_flops_that_the_blog_counts() -> None:
    name = "dinov2_vits14_lc"
    net = skeleton_net(name)
    cost, times = Cost(net, 644), [Latency(1.0, 1.0, 0.0)] * 2
    plan = Plan(model={"name": name, "args": {}}, edits=())
    report = record(cost, count(net, 644), plan, times, None, {"cut": None}, TARGET)
    for side in ("dense", "compact"):
        assert report[side]["flops_blog"] == 91_096_848_384 < report[side]["flops"]
