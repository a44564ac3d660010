from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from conftest import MODEL, SIZE, plan_of, skeleton_net, small_net
from vitrim import Drop, Plan, count, cut, measure
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.measure import Latency, latencies
from vitrim.report.record import record

CUT = plan_of({"blocks.0.attn.qk": (0, 1, 9), "blocks.1.attn.v": (1, 2, 3, 20)})


@pytest.fixture
def unfused() -> Iterator[None]:
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def test_vit_base_has_its_exact_numbers() -> None:
    found = count(skeleton_net("vit_base_patch16_224"), 224)
    assert found == (86_567_656, 17_563_828_224, 35_127_656_448)
    assert found._fields == ("params", "macs", "flops")


def test_plain_attention_of_vit_base_counts_the_same(unfused: None) -> None:
    net = skeleton_net("vit_base_patch16_224")
    assert not any(block.attn.fused_attn for block in net.blocks)
    assert count(net, 224).macs == 17_563_828_224


@pytest.mark.parametrize("plan", [plan_of({}), CUT], ids=["dense", "cut"])
def test_the_count_ignores_the_kernel_the_mode_and_the_precision(plan: Plan) -> None:
    counts = set()
    for fused in (False, True):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            net = cut(small_net(dtype=dtype), plan)
            for block in net.blocks:
                block.attn.fused_attn = fused
            counts |= {count(net.train(), SIZE), count(net.eval(), SIZE)}
    assert len(counts) == 1


@pytest.mark.parametrize(
    "args", [{"patch_drop_rate": 0.5}, {"drop_path_rate": 0.5, "attn_drop_rate": 0.5}], ids=str
)
def test_what_training_drops_is_counted(args: dict[str, Any]) -> None:
    expected = count(small_net(), SIZE)
    net = small_net(**args)
    assert count(net.eval(), SIZE) == expected
    assert count(net.train(), SIZE) == expected


def test_a_network_with_batch_norm_can_be_counted_in_both_modes() -> None:
    net = timm.create_model("resnet10t", pretrained=False, num_classes=7)
    assert count(net.train(), SIZE) == count(net.eval(), SIZE)
    assert int(net.bn1.num_batches_tracked) == 0


@pytest.mark.parametrize("training", [False, True])
def test_counting_leaves_the_network_and_the_generator_alone(training: bool) -> None:
    net = small_net(attn_drop_rate=0.5, drop_path_rate=0.5).train(training)
    tensors = {name: (id(p), p.clone()) for name, p in net.named_parameters()}
    state = torch.get_rng_state()
    count(net, SIZE)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in net.named_parameters():
        assert id(parameter) == tensors[name][0]
        assert torch.equal(parameter, tensors[name][1])
        assert parameter.grad is None
    assert all(module.training == training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_failed_count_leaves_no_hooks() -> None:
    net = small_net()
    with pytest.raises(AssertionError, match="match model"):
        Cost(net, 48)
    assert not any(module._forward_hooks for module in net.modules())


def test_sizes_are_a_side_or_height_and_width_or_all_three() -> None:
    square = count(small_net(), SIZE)
    assert count(small_net(), (SIZE, SIZE)) == count(small_net(), (3, SIZE, SIZE)) == square
    grey = small_net(in_chans=1, img_size=(32, 48))
    found = count(grey, (32, 48))
    assert found == count(grey, (1, 32, 48))
    assert measure.image_shape(grey, (32, 48)) == (1, 32, 48)
    blocks = 2 * (7 * (4 * 24 * 24 + 2 * 24 * 48) + 2 * 7 * 7 * 24)
    assert found.macs == 6 * 16 * 16 * 24 + blocks + 24 * 7


def test_latency_is_one_positive_number_per_network() -> None:
    nets = [small_net(dtype=torch.float32), cut(small_net(dtype=torch.float32), CUT)]
    times = latencies(nets, SIZE, batch=2, repeats=2, device="cpu", blocks=False)
    assert len(times) == 2
    assert all(0 < time.median < 10_000 and time.std >= 0 and not time.blocks for time in times)


def test_blocks_are_timed_where_they_are() -> None:
    drops = tuple(Drop(branch=f"blocks.1.{part}") for part in ("attn", "mlp"))
    dense = small_net(dtype=torch.float32)
    nets = [dense, cut(dense, Plan(model=MODEL, edits=drops))]
    whole, less = latencies(nets, SIZE, batch=2, repeats=3, device="cpu", blocks=True)
    assert set(whole.blocks) == {"blocks.0", "blocks.1"}
    assert set(less.blocks) == {"blocks.0"}
    assert all(0 < part.mean < 10_000 for part in whole.blocks.values())
    assert not any(module._forward_hooks for module in dense.modules())


def pair() -> tuple[nn.Module, nn.Module, Cost]:
    dense = small_net()
    return dense, cut(dense, CUT), Cost(dense, SIZE)


def test_a_record_holds_both_sides_and_what_was_kept() -> None:
    dense, compact, cost = pair()
    dense_accuracy = {"top1": 90.0, "top5": 99.0}
    stages = {"cut": None, "refit": {"top1": 80.0, "top5": 98.0}}
    budget = Target(metric="macs", keep=0.9)
    times = [Latency(2.0, 2.1, 0.1), Latency(1.0, 1.1, 0.1, {"blocks.0": Latency(0.4, 0.5, 0.2)})]
    found = record((dense, compact), cost, CUT, times, dense_accuracy, stages, budget)
    for side, net, top1, latency in (
        ("dense", dense, 90.0, 2.0),
        ("compact", compact, 80.0, 1.0),
    ):
        size = count(net, SIZE)._asdict()
        assert found[side] == {**found[side], **size, "top1": top1, "latency_ms": latency}
    assert "blocks_ms" not in found["dense"]
    assert found["compact"]["blocks_ms"] == {"blocks.0": [0.5, 0.2]}
    assert (found["dense"]["latency_mean_ms"], found["dense"]["latency_std_ms"]) == (2.1, 0.1)
    assert found["cut"] == {"top1": None, "top5": None}
    assert found["stages"] == {"cut": found["cut"], "refit": {"top1": 80.0, "top5": 98.0}}
    assert found["kept"]["macs"] == count(compact, SIZE).macs / count(dense, SIZE).macs
    assert found["kept"]["params"] == count(compact, SIZE).params / count(dense, SIZE).params
    assert found["target"] == {"metric": "macs", "keep": 0.9}


def test_a_record_is_refused_where_formula_and_counter_disagree() -> None:
    dense, compact, cost = pair()
    budget = Target(metric="macs", keep=0.9)
    with pytest.raises(AssertionError, match="formula"):
        record((dense, compact), cost, plan_of({}), (1.0, 1.0), None, {"cut": None}, budget)


def test_versions_name_what_a_result_depends_on() -> None:
    found = measure.versions()
    assert {"python", "torch", "timm", "lightning"} <= found["versions"].keys()
    assert all(isinstance(version, str) and version for version in found["versions"].values())
