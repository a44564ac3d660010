"""Adaptors trained end to end: where they are, what they recover, and resuming to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from lightning import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nets import fit, randomise, skeleton_net, small_net
from phase_runner import DIGITS, At, killed, runner, stop
from vitrim.jobs import signals
from vitrim.jobs.signals import Preempted
from vitrim.method.practise.adaptors import Place, places_of, widths_of
from vitrim.method.practise.end_to_end import EndToEnd
from vitrim.method.practise.recoverability import Recoverability
from vitrim.method.practise.settings import AdaptorTraining
from vitrim.network import structure
from vitrim.trainer.calibrate import Sampling

GROUPS = [("blocks.1",), ("blocks.2",)]


def training(iterations: int, lr: float = 0.02) -> AdaptorTraining:
    return AdaptorTraining(
        iterations=iterations, lr=lr, momentum=0.9, weight_decay=1e-4, decay_every=0.4, decay=0.1
    )


def loader() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, torch.zeros(24)), batch_size=8)


def errors_of(net: nn.Module, groups: list[tuple[str, ...]], iterations: int, lr: float) -> Tensor:
    phase = EndToEnd(
        net, groups=groups, images=24, training=training(iterations, lr), latency_repeats=0
    )
    fit(phase, loader(), epochs=phase.epochs)
    assert phase.epochs == -(-iterations // 3) + 1
    scores = phase.evidence().block_scores
    assert [*scores] == [group[0] for group in groups]
    return torch.tensor([*scores.values()], dtype=torch.float64)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return small_net(dtype=torch.float32, depth=4)


def test_adaptors_that_are_not_trained_change_nothing(net: nn.Module) -> None:
    plain = Recoverability(
        net,
        groups=GROUPS,
        sampling=Sampling(images=24, tokens=None, class_token_weight=1.0),
        adaptors=False,
        ridge=1e-3,
        latency_repeats=0,
    )
    fit(plain, loader(), epochs=plain.epochs)
    errors = [*plain.evidence().block_scores.values()]
    assert errors_of(net, GROUPS, 1, 1e-30).tolist() == pytest.approx(errors, rel=1e-6)


def test_training_recovers_features_and_changes_nothing_else(net: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    few, many = (errors_of(net, GROUPS, n, 0.05) for n in (1, 40))
    assert bool((many < 0.9 * few).all())
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in net.parameters())
    hooks = (m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(hooks)


def test_a_pair_of_blocks_is_removed_together(net: nn.Module) -> None:
    pair, *single = errors_of(net, [("blocks.1", "blocks.2")], 1, 1e-30), *GROUPS
    assert pair.shape == (1,)
    assert all(pair != errors_of(net, [group], 1, 1e-30) for group in single)


def test_savings_are_measured(net: nn.Module) -> None:
    groups = [("blocks.0", "blocks.1", "blocks.2"), ("blocks.3",)]
    phase = EndToEnd(net, groups=groups, images=24, training=training(1), latency_repeats=9)
    fit(phase, loader(), epochs=phase.epochs)
    assert phase.scores.shape == (2, 2)
    evidence = phase.evidence()
    assert [*evidence.block_scores] == [*evidence.block_savings] == ["blocks.0", "blocks.3"]
    assert 0 < evidence.block_savings["blocks.3"] < evidence.block_savings["blocks.0"] < 1


def test_adaptors_of_a_transformer_are_around_the_block() -> None:
    net = skeleton_net(depth=4)
    assert set(places_of(net, structure(net), ("blocks.1",))) == {
        Place("blocks.0.mlp.fc2", False),
        Place("blocks.2.attn.qkv", True),
        Place("blocks.3.attn.qkv", True),
    }


def test_adaptors_of_a_convolutional_network_stay_in_the_stage() -> None:
    net = randomise(timm.create_model("resnet18").float()).eval()
    places = places_of(net, structure(net), ("layer2.1",))
    assert set(places) == {
        Place("layer2.0.conv2", False),
        Place("layer2.0.downsample.0", False),
        Place("layer3.0.conv1", True),
        Place("layer3.0.downsample.0", True),
    }
    assert {*widths_of(net, places, torch.randn(1, 3, 32, 32)).values()} == {128}
    few, many = (errors_of(net, [("layer2.1",)], n, 0.02) for n in (1, 9))
    assert bool((many < few).all())


STEPS = 5  # in an epoch


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    with signals.handled():
        yield


def scored(folder: Path, *callbacks: Callback) -> Tensor:
    """Score two blocks: 12 iterations in three epochs of 5 batches, and an epoch of measuring."""
    phase = EndToEnd(
        small_net(dtype=torch.float32, depth=4, **DIGITS),
        groups=GROUPS,
        images=8 * STEPS,
        training=training(12),
        latency_repeats=0,
    )
    runner(folder, minutes=0.0, batch_size=8).run_or_load(
        folder / "x", phase, name="x", callbacks=callbacks
    )
    return phase.scores


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return scored(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", [7, 12, 3 * STEPS, 3 * STEPS + 2])
def test_scoring_stopped_anywhere_ends_the_same(step: int, scores: Tensor, tmp_path: Path) -> None:
    with pytest.raises(Preempted), signals.handled():
        scored(tmp_path, At(step, stop()))
    over = At(1, partial(pytest.fail, "started over"))
    assert torch.equal(scored(tmp_path, over), scores)
    assert torch.equal(scored(tmp_path, over), scores)  # loaded


def test_scoring_killed_again_and_again_ends_the_same(scores: Tensor, tmp_path: Path) -> None:
    for step in (4, 11, 17):
        with pytest.raises(SystemError):
            scored(tmp_path, At(step, killed))
    assert torch.equal(scored(tmp_path), scores)
