"""Calibration: what it measures, which tokens, and that it leaves nothing behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import images, small_net
from vitrim.errors import ConfigError
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Calibrate, Sampling, gather_tokens

SITES = ["blocks.0.mlp.hidden", "blocks.1.attn.heads", "blocks.1.attn.qk"]
ALL = Sampling(images=8, tokens=None, class_token_weight=1.0)


def calibrate(net: nn.Module, x: Tensor, batch: int, **options: Any) -> Evidence:
    settings = {"sites": SITES, "sampling": ALL, "taylor": False, **options}
    phase = Calibrate(net, **settings)
    phase.on_train_start()
    for number, part in enumerate(x.split(batch)):
        phase.training_step((part, None), number)
    phase.on_train_end()
    return phase.evidence()


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_moments_do_not_depend_on_the_batches(batch: int) -> None:
    net, x = small_net(), images(batch=8)
    found, expected = (calibrate(net, x, size).moments for size in (batch, 8))
    assert found.keys() == expected.keys()
    assert {"blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.attn.qk"} <= found.keys()
    for name, tensors in expected.items():
        for what, tensor in tensors.items():
            assert torch.allclose(found[name][what], tensor, rtol=1e-4, atol=1e-6), (name, what)


@pytest.mark.parametrize("taylor", [False, True])
def test_statistics_within_autocast_are_those_of_full_precision(taylor: bool) -> None:
    net, x = small_net(dtype=torch.float32), images(batch=8, dtype=torch.float32)
    expected = calibrate(net, x, 4, taylor=taylor).moments
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = calibrate(net, x, 4, taylor=taylor).moments
    for name, tensors in expected.items():
        for what, tensor in tensors.items():
            assert torch.equal(found[name][what], tensor), (name, what)


def test_memory_does_not_grow_with_the_images() -> None:
    sizes = []
    for n in (8, 24):
        found = calibrate(small_net(), images(batch=n), 4, taylor=True).moments
        sizes.append({(name, what): x.shape for name in found for what, x in found[name].items()})
    assert sizes[0] == sizes[1]


def test_the_network_is_left_as_it_was() -> None:
    net = small_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    calibrate(net, images(batch=8), 4, taylor=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_first_order_effects_are_those_of_a_gate_on_each_unit() -> None:
    net, x = small_net(), images(batch=3)
    found = calibrate(net, x, 3, taylor=True).moments["blocks.0.mlp.fc2"]["taylor"]
    expected = torch.zeros(48, dtype=torch.float64)
    for image in x.split(1):
        gate = torch.ones(48, dtype=torch.float64, requires_grad=True)
        handle = net.blocks[0].mlp.fc2.register_forward_pre_hook(
            lambda m, args, g=gate: args[0] * g
        )
        logits = net(image)
        handle.remove()
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), gate)
        expected += slope.abs()
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(
    ("tokens", "count"), [(None, 196), (48, 49), (100, 196), (1, 1), (500, 196)]
)
def test_sampled_tokens_are_spread_and_differ_between_images(
    tokens: int | None, count: int
) -> None:
    index = Sampling(images=1, tokens=tokens, class_token_weight=1.0).index(
        torch.empty(5, 198, 1), 2, 0
    )
    assert index.shape == (5, 2 + count)
    assert bool((index[:, :2] == torch.arange(2)).all())
    assert bool((index[:, 2:] >= 2).all())
    assert bool((index < 198).all())
    assert all(len(set(row.tolist())) == 2 + count for row in index)
    assert (len({tuple(row.tolist()) for row in index}) > 1) == (count < 196)


@pytest.mark.parametrize("tokens", [None, 3])
def test_of_a_class_token_alone_that_is_sampled(tokens: int | None) -> None:
    sampling = Sampling(images=1, tokens=tokens, class_token_weight=1.0)
    assert sampling.index(torch.empty(5, 1, 7), 1, 0).tolist() == [[0]] * 5


@pytest.mark.parametrize(("given", "each"), [(None, 3), (9, 3), (8, 3), (5, 3), (4, 6), (1, 24)])
def test_of_fewer_images_more_tokens_are_taken(given: int | None, each: int) -> None:
    sampling = Sampling(images=8, tokens=3, class_token_weight=1.0, available_images=given)
    assert sampling.tokens_per_image == each
    assert sampling.index(torch.empty(1, 200, 1), 2, 0).shape[1] >= 2 + each
    assert replace(sampling, tokens=None).tokens_per_image is None


def test_huge_tokens_do_not_outweigh_the_others() -> None:
    x = images(batch=2).flatten(2).transpose(1, 2)[:, :6].repeat(1, 1, 8)
    x[:, 3] *= 100
    weights = replace(ALL, class_token_weight=4.0).weights(x, n_prefix_tokens=1, n_readout_tokens=1)
    assert torch.equal(weights[:, 0], torch.full((2,), 4.0))
    assert torch.allclose(weights[:, 1:].mean(1), torch.ones(2))
    assert bool((weights[:, 3] < 1e-2).all())


def test_taking_tokens_keeps_their_order() -> None:
    x = torch.arange(12.0).view(1, 4, 3)
    assert torch.equal(gather_tokens(x, torch.tensor([[2, 0]])), x[:, [2, 0]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 0},
        {"images": 1.5},
        {"tokens": 0},
        {"class_token_weight": 0.0},
        {"class_token_weight": -1.0},
    ],
)
def test_sampling_nothing_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"method\.sampling\.{name}"):
        Sampling(**{"images": 8, "tokens": None, "class_token_weight": 1.0, **wrong})


def test_without_images_there_is_no_evidence() -> None:
    phase = Calibrate(small_net(), sites=SITES, sampling=ALL, taylor=False)
    assert phase.evidence().moments == {}
