"""Batches whose activations would not fit in memory are taken in parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nets import images, small_net
from vitrim.method.dcvit.mlp_statistics import CompressedMLP, MLPStatistics
from vitrim.method.mixed_rank.pieces import Piece
from vitrim.method.mixed_rank.profile import Profile
from vitrim.trainer import activations
from vitrim.trainer.activations import Batches, capture
from vitrim.trainer.calibrate import Calibrate, Sampling

POINTS = [("blocks.0.mlp.fc2", False), ("blocks.1.norm2", True)]
SAMPLING = Sampling(images=8, tokens=None, class_token_weight=2.0)
STATISTICS = ["units", "units with taylor", "layers", "MLPs"]


def bytes_of(net: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), capture(net, POINTS) as captured:
        net(x)
    return sum(tensor.nbytes for tensor in captured.values())


def test_a_batch_that_fits_is_left_whole() -> None:
    x = images(batch=8)
    (part,) = Batches(POINTS).of(x, small_net())
    assert torch.equal(part, x)


@pytest.mark.parametrize("most", [1, 3, 8])
def test_parts_are_as_large_as_fits(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = small_net(), images(batch=8)
    limit = bytes_of(net, x[:most])
    monkeypatch.setattr(activations, "_CAPTURED_BYTES", limit)
    parts = Batches(POINTS).of(x, net)
    assert torch.equal(torch.cat([*parts]), x)
    assert max(bytes_of(net, part) for part in parts) == limit


def test_parts_are_smaller_where_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = small_net(), images(batch=8)
    monkeypatch.setattr(activations, "_CAPTURED_BYTES", bytes_of(net, x[:6]))
    assert [len(part) for part in Batches(POINTS, graph=True).of(x, net)] == [4, 4]


def test_an_image_that_alone_is_too_large_is_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_CAPTURED_BYTES", 1)
    assert [len(part) for part in Batches(POINTS).of(images(batch=3), small_net())] == [1, 1, 1]
    assert not Batches(POINTS).of(images(batch=3)[:0], small_net())


def gathered(statistics: str) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the statistics of 8 images, taken in as one batch."""
    net, x = small_net(), images(batch=8)
    if statistics == "MLPs":
        mlp = CompressedMLP("blocks.1.attn", "blocks.1.mlp", "blocks.1.mlp.fc2")
        found = MLPStatistics(net, [mlp], "regression", SAMPLING)
        found.add(net, x)
        found.finish()
        moments = found.tensors()
    else:
        phase: Calibrate | Profile
        if statistics == "layers":
            pieces = {"fc2": Piece("blocks.1.mlp.fc2", 0, 24, 48)}
            phase = Profile(
                net, pieces=pieces, decomposition="loss", sampling=SAMPLING, gradient_images=6
            )
        else:
            sites = ["blocks.0.mlp.hidden", "blocks.1.attn.qk"]
            phase = Calibrate(
                net, sites=sites, sampling=SAMPLING, taylor=statistics == "units with taylor"
            )
        phase.on_train_start()
        phase.training_step((x, x), 0)
        phase.on_train_end()
        moments = phase.evidence().moments
    for name, tensors in moments.items():
        for what, tensor in tensors.items():
            yield f"{name}.{what}", tensor


@pytest.mark.parametrize("statistics", STATISTICS)
def test_statistics_of_parts_are_those_of_the_batch(
    statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dict(gathered(statistics))
    monkeypatch.setattr(activations, "_CAPTURED_BYTES", 1)
    parts = dict(gathered(statistics))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.allclose(parts[name], tensor, rtol=1e-4, atol=1e-6), name
