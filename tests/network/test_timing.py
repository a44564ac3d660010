"""Forward passes are timed by the clock of their device, in the arrangement that is fastest."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

import vitrim
from command import QUICK, Command
from nets import images, plan_of, small_net
from vitrim import cut
from vitrim.measure import LatencySettings, in_precision, latencies, latency_entry
from vitrim.network import timing
from vitrim.network.head_runs import sliced_attentions
from vitrim.network.timing import CpuClock, CudaClock, clock_of, fastest_heads, interleaved_times

UNEQUAL = plan_of({"blocks.0.attn.qk": (0, 1, 2, 8, 16, 17), "blocks.0.attn.v": (0, 8, 9, 16)})
HOW: dict[str, Any] = {"batch": 2, "repeats": 2, "device": "cpu", "blocks": False}


def test_the_clock_of_the_cpu_measures_what_a_call_takes() -> None:
    (times,) = interleaved_times([lambda: time.sleep(0.004)], 3, clock=clock_of("cpu"))
    assert len(times) == 3
    assert all(4 <= milliseconds < 400 for milliseconds in times)


def test_time_ends_where_it_is_stopped() -> None:
    stop = CpuClock().start()
    milliseconds = stop()
    time.sleep(0.01)
    assert milliseconds() == milliseconds() < 10


def test_a_gpu_has_a_clock_of_events_and_a_longer_warm_up() -> None:
    clock = clock_of("cuda:1")
    assert isinstance(clock, CudaClock)
    assert clock.device == torch.device("cuda:1")
    assert clock.warm_up > clock_of("cpu").warm_up


@pytest.mark.gpu
def test_events_and_graphs_time_real_passes() -> None:
    net = cut(small_net(dtype=torch.float32), UNEQUAL)
    how = HOW | {"device": "cuda", "heads": "fastest", "precision": "bf16"}
    for graphs in (False, True):
        (found,) = latencies([net], 32, **how, graphs=graphs)
        assert 0 < found.median < 1000


def test_the_fastest_arrangement_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = cut(small_net(dtype=torch.float32), UNEQUAL).eval(), images(dtype=torch.float32)
    monkeypatch.setattr(timing, "_FASTEST", {})
    first = fastest_heads(net, x)
    assert [*timing._FASTEST.values()] == [first]
    assert fastest_heads(net, x) == first
    assert {attn.arrangement for attn in sliced_attentions(net).values()} == {"runs"}
    assert fastest_heads(small_net(dtype=torch.float32), x) == "runs"
    assert len(timing._FASTEST) == 1  # a dense network has nothing to choose


def test_a_latency_says_how_heads_were_run_and_leaves_the_network_alone() -> None:
    net = cut(small_net(dtype=torch.float32), UNEQUAL)
    (padded,) = latencies([net], 32, **HOW, heads="padded")
    assert padded.heads == "padded"
    assert {attn.arrangement for attn in sliced_attentions(net).values()} == {"runs"}
    settings = LatencySettings(**HOW, precision="bf16")
    assert latency_entry(settings, net, "padded") == {
        **HOW,
        "precision": "bf16",
        "heads": "padded",
        "threads": torch.get_num_threads(),
    }


def test_another_precision_is_a_copy() -> None:
    net = small_net(dtype=torch.float32)
    assert in_precision(net, "cpu", "fp32") is net
    half = in_precision(net, "cpu", "bf16")
    assert next(half.parameters()).dtype == torch.bfloat16
    assert next(net.parameters()).dtype == torch.float32
    assert latencies([net], 32, **HOW, precision="bf16")[0].median > 0


def test_tf32_is_said_where_a_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net(dtype=torch.float32)
    settings = LatencySettings(**HOW | {"device": "cuda"}, graphs=True)
    entry = latency_entry(settings, net, "runs")
    assert entry["precision"] == "fp32, TF32 in convolutions"  # PyTorch's default
    assert entry["device"] == "cuda, graphs"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert latency_entry(settings, net, "runs")["precision"] == "fp32"


def test_what_cannot_be_timed_is_refused(command: Command) -> None:
    words = ("latency.heads=sorted", "latency.graphs=true", "latency.precision=bf16")
    done = command(*words, "quantize=[int8_dynamic]")
    assert done.code == 1
    refused = command("data=none", "heads=padded")
    assert "heads=padded: data=none has no images to train on" in refused.message
    for message in (
        "latency.heads=sorted: expected one of runs, fused, padded, fastest",
        "latency.graphs=true: CUDA graphs need a GPU: set latency.device=cuda",
        "latency.precision=bf16: int8 networks are timed in fp32: leave quantize out",
    ):
        assert message in done.message


@pytest.mark.slow
def test_a_network_is_trained_in_an_arrangement(command: Command) -> None:
    words = (*QUICK, "method=vtp", "strength=2", "method.gating.epochs=1")
    words = (*words, "method.fine_tuning.epochs=1", f"out={command.out}")
    plain, fused = (command(*words, *more) for more in ((), ("heads=fused",)))
    one, other = (vitrim.load(done.report.parent) for done in (plain, fused))
    assert plain.report.parent != fused.report.parent
    assert len([*command.out.glob("phases/score-*")]) == 1  # what comes before is shared
    assert one[1].edits == other[1].edits
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_report_says_how_heads_were_run(command: Command) -> None:
    words = ("data=none", "method=oneshot", "latency.heads=fused", "latency.repeats=1")
    report = json.loads(command(*words, "tracking=none").report.read_text())
    assert report["latency"]["heads"] == "fused"
