"""Synthetic images: optimised for a network, within the range of pixels, penalised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import small_net
from vitrim.errors import ConfigError
from vitrim.method.dcvit.synthetic import PixelRange, SyntheticImages, total_variation

SETTINGS: dict[str, Any] = {
    "images": 5,
    "iterations": 30,
    "warmup": 3,
    "lr": 0.25,
    "betas": [0.5, 0.9],
    "jitter": 2,
    "tv_weight": 1e-4,
    "tv_exponent": 0.6,
    "l2_weight": 1e-5,
    "batch_size": 4,
}
LOW, HIGH = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.0, 2.0, 3.0])


def synthesised(net: nn.Module, seed: int = 0, **changes: Any) -> tuple[Tensor, Tensor]:
    synthetic = SyntheticImages(**SETTINGS | changes)
    pixels = PixelRange(LOW, HIGH)
    return synthetic.run(net, n_classes=7, pixels=pixels, size=(32, 32), seed=seed)


def test_more_iterations_make_the_network_more_confident() -> None:
    net = small_net(dtype=torch.float32)
    losses = []
    for iterations in (1, 20, 200):
        images, labels = synthesised(net, iterations=iterations, jitter=0)
        assert images.shape == (5, 3, 32, 32)
        assert len(set(labels.tolist())) == 5
        with torch.no_grad():
            losses.append(F.cross_entropy(net(images), labels).item())
    assert losses[0] > losses[1] > losses[2]


def test_the_range_of_two_batches_is_that_of_all_images() -> None:
    first, second = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    both = PixelRange.of(torch.cat([first, second]))
    for one, other in zip(PixelRange.of(first).union(PixelRange.of(second)), both, strict=True):
        assert torch.equal(one, other)


def test_pixels_stay_in_range_and_parameters_as_they_are() -> None:
    net = small_net(dtype=torch.float32)
    net.get_parameter("pos_embed").requires_grad_(False)
    before = [(tensor.clone(), tensor.requires_grad) for tensor in net.parameters()]
    images, _ = synthesised(net)
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    assert bool((low >= LOW).all())
    assert bool((high <= HIGH).all())
    for tensor, (value, trained) in zip(net.parameters(), before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor.requires_grad == trained
        assert tensor.grad is None


def test_the_same_network_and_seed_have_the_same_images() -> None:
    net = small_net(dtype=torch.float32)
    one, same, other = (synthesised(net, seed, iterations=3) for seed in (0, 0, 1))
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_more_images_than_classes_share_them() -> None:
    _, labels = synthesised(small_net(dtype=torch.float32), images=9, iterations=1)
    assert sorted(labels.bincount(minlength=7).tolist()) == [1, 1, 1, 1, 1, 2, 2]


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[[[0.0, 3.0], [4.0, 0.0]]]])
    # right: 3 and -4; down: 4 and -3; falling: 0; rising: 1
    assert total_variation(image, 1.0).item() == pytest.approx(5 + 5 + 0 + 1)
    assert total_variation(image, 0.5).item() == pytest.approx(5**0.5 + 5**0.5 + 1)


def test_a_flat_image_has_no_variation_and_a_finite_slope() -> None:
    image = torch.ones(1, 1, 3, 3, requires_grad=True)
    total_variation(image, 0.6).backward()  # type: ignore[no-untyped-call]
    assert image.grad is not None
    assert bool(torch.isfinite(image.grad).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, r"method\.synthetic\.images=0"),
        ({"lr": -1}, r"method\.synthetic\.lr=-1"),
        ({"tv_exponent": 0}, r"method\.synthetic\.tv_exponent=0"),
        ({"betas": [0.5]}, r"method\.synthetic\.betas=\[0\.5\]"),
        ({"jitter": 1.5}, r"method\.synthetic\.jitter=1\.5"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticImages(**SETTINGS | changes)
