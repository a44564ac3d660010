from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_fused_attn

from nets import MODEL, SIZE, plan_of, skeleton_net, small_net
from vitrim import Drop, Plan, count, cut, measure
from vitrim.budget.cost import Cost
from vitrim.measure import InputSizeError, latencies

CUT = plan_of({"blocks.0.attn.qk": (0, 1, 9), "blocks.1.attn.v": (1, 2, 3, 20)})


@pytest.fixture
def unfused() -> Iterator[None]:
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def test_vit_base_has_its_exact_numbers() -> None:
    counted = count(skeleton_net("vit_base_patch16_224"), 224)
    assert counted == (86_567_656, 17_563_828_224, 35_127_656_448)
    assert counted._fields == ("params", "macs", "flops")


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
    with pytest.raises(InputSizeError, match="match model"):
        Cost(net, 48)
    assert not any(module._forward_hooks for module in net.modules())


def test_sizes_are_a_side_or_height_and_width_or_all_three() -> None:
    square = count(small_net(), SIZE)
    assert count(small_net(), (SIZE, SIZE)) == count(small_net(), (3, SIZE, SIZE)) == square
    grey = small_net(in_chans=1, img_size=(32, 48))
    counted = count(grey, (32, 48))
    assert counted == count(grey, (1, 32, 48))
    assert measure.image_shape(grey, (32, 48)) == (1, 32, 48)
    blocks = 2 * (7 * (4 * 24 * 24 + 2 * 24 * 48) + 2 * 7 * 7 * 24)
    assert counted.macs == 6 * 16 * 16 * 24 + blocks + 24 * 7


def test_latency_is_one_positive_number_per_network() -> None:
    nets = [small_net(dtype=torch.float32), cut(small_net(dtype=torch.float32), CUT)]
    times = latencies(nets, SIZE, batch=2, repeats=2, device="cpu", blocks=False)
    assert len(times) == 2
    assert all(0 < time.median < 10_000 and time.std >= 0 and not time.blocks for time in times)


def test_blocks_are_timed_where_they_are() -> None:
    drops = tuple(Drop(branch=f"blocks.1.{part}") for part in ("attn", "mlp"))
    dense = small_net(dtype=torch.float32)
    nets = [dense, cut(dense, Plan(model=MODEL, edits=drops))]
    full, less = latencies(nets, SIZE, batch=2, repeats=3, device="cpu", blocks=True)
    assert set(full.blocks) == {"blocks.0", "blocks.1"}
    assert set(less.blocks) == {"blocks.0"}
    assert all(0 < part.mean < 10_000 for part in full.blocks.values())
    assert not any(module._forward_hooks for module in dense.modules())
