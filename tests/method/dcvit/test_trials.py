"""Trials of dense compression: scores, closed-form starts, training towards kept features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import fit, randomise, small_net
from vitrim.method.dcvit.trials import CANDIDATE, METRIC_SET, Trials, best_of, learnt, solved
from vitrim.network.surgery import cut
from vitrim.plan import BLOCKS, Drop, Keep, Plan
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import frozen
from vitrim.trainer.recipe import Recipe

SINGLES = [("blocks.1",), ("blocks.2",)]
ENDS = {block: f"{block}.mlp.fc2" for (block,) in SINGLES}
NONE = Recipe(epochs=0, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)


def deep(**args: Any) -> nn.Module:
    return small_net(dtype=torch.float32, depth=4, **args)


def loader(n: int = 24) -> DataLoader[Any]:
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, torch.zeros(n, dtype=torch.long)), batch_size=8)


def tried(net: nn.Module, n: int = 24, **changes: Any) -> Trials:
    settings: dict[str, Any] = {
        "groups": SINGLES,
        "sampling": Sampling(images=n, tokens=None, readout=1.0),
        "reuse": "surgeon",
        "regression": True,
        "ridges": (1e-3, 1e-6),
        "width": 0.5,
        "recipe": NONE,
        "front": True,
        "metric_set": None,
        "distance": "kl",
        "seed": 0,
    }
    phase = Trials(net, **settings | changes)
    fit(phase, loader(n), epochs=phase.epochs)
    return phase


def scores(phase: Trials) -> Tensor:
    return phase.evidence().scores[BLOCKS]


def test_an_attention_that_does_nothing_is_the_easiest_to_lose() -> None:
    net = deep()
    with torch.no_grad():
        for tensor in net.get_submodule("blocks.2.attn.proj").parameters():
            tensor.zero_()
    found = scores(tried(net, n=64, width=1.0))
    assert found[1] < 1e-4 * found[0]


@pytest.mark.parametrize("scaled", [False, True])
def test_least_squares_beats_what_is_merely_left(scaled: bool) -> None:
    net = deep(init_values=0.5 if scaled else None)
    solved_scores, left = (scores(tried(net, regression=on, n=64)) for on in (True, False))
    assert bool((solved_scores < left).all())


def test_the_score_is_the_distance_of_the_network_with_that_block_compressed() -> None:
    net = deep()
    phase = tried(net)
    evidence = phase.evidence()
    site = "blocks.2.mlp.hidden"
    keep = best_of(evidence.scores[site], 24)
    plan = Plan(model={}, edits=(Drop(branch="blocks.2.attn"), Keep(site=site, index=keep)))
    compact = cut(net, plan)
    with torch.no_grad():
        for name, value in solved(compact, plan, evidence, ENDS, 1e-6).items():
            compact.get_parameter(name).copy_(value)
        assert METRIC_SET not in evidence.moments
        x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
        wanted, found = (n(x).log_softmax(-1) for n in (net, compact))
        distance = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    assert scores(phase)[1].item() == pytest.approx(distance.item(), rel=1e-4)


def test_a_convolutional_trial_is_the_network_without_the_block() -> None:
    torch.manual_seed(0)
    net = randomise(timm.create_model("resnet18", num_classes=5).float()).eval()
    blocks = ["layer1.1", "layer2.1", "layer4.1"]
    phase = tried(net, groups=[(block,) for block in blocks])
    x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
    expected = []
    for block in blocks:
        compact = cut(net, Plan(model={}, edits=(Drop(branch=block),)))
        with torch.no_grad():
            wanted, found = (n(x).log_softmax(-1) for n in (net, compact))
        distance = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
        expected.append(distance.item())
    assert scores(phase).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_convolutional_trial_is_kept_with_what_its_norms_counted() -> None:
    torch.manual_seed(0)
    net = randomise(timm.create_model("resnet18", num_classes=5).float()).eval()
    before = copy.deepcopy(net.state_dict())
    recipe = Recipe(epochs=2, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=1.0)
    phase = tried(net, groups=[("layer1.1",), ("layer2.1",)], recipe=recipe)
    kept = phase.evidence().moments[CANDIDATE]
    dropped = ("layer1.1", "layer2.1")[int(kept["place"])]
    trial = cut(net, Plan(model={}, edits=(Drop(branch=dropped),)))
    tensors = learnt(trial)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, values in zip(tensors, kept["parameters"].split(sizes), strict=True):
        tensor.copy_(values.view_as(tensor))
    x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted, found = (n(x).log_softmax(-1) for n in (net, trial))
    distance = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    assert scores(phase).min().item() == pytest.approx(distance.item(), rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_group_is_one_trial_of_all_its_blocks() -> None:
    net = deep()
    phase = tried(net, groups=[("blocks.1", "blocks.2")], width=1.0, regression=False)
    compact = cut(net, Plan(model={}, edits=tuple(Drop(branch=f"{b}.attn") for b in ENDS)))
    x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted, found = (n(x).log_softmax(-1) for n in (net, compact))
    distance = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    assert scores(phase).tolist() == pytest.approx([distance.item()], rel=1e-4)


def test_groups_train_as_single_blocks_do() -> None:
    recipe = Recipe(epochs=3, lr=2e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=1.0)
    how: dict[str, Any] = {"distance": "mse", "regression": False}
    both = [("blocks.1", "blocks.2")]
    still, phase = (tried(deep(), groups=both, recipe=by, **how) for by in (NONE, recipe))
    assert phase.epochs == 4
    assert bool((scores(phase) < scores(still)).all())
    single = scores(tried(deep(), recipe=recipe, **how))
    assert bool((scores(phase) > single.max()).all())


def test_training_brings_a_trial_nearer() -> None:
    recipe = Recipe(epochs=6, lr=2e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=1.0)
    net = deep()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    still, trained = (
        scores(tried(net, recipe=by, distance="mse", regression=False)) for by in (NONE, recipe)
    )
    assert bool((trained < still).all())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_rear_and_the_classifier_stay() -> None:
    names = frozen(deep(), ["blocks.1"], front=True)
    parts = {".".join(name.split(".")[:2]) for name in names}
    assert parts == {"head.weight", "head.bias", "blocks.3"}
    assert frozen(deep(), ["blocks.1"], front=False) == {"head.weight", "head.bias"}
    assert frozen(deep(), ["blocks.0", "blocks.1"], front=True) == names
    assert frozen(deep(), ["blocks.3"], front=True) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("reuse", ["surgeon", "activation", "random"])
def test_every_way_to_choose_units_ranks_all_of_them(reuse: str) -> None:
    found = tried(deep(), reuse=reuse).evidence().scores
    for (block,) in SINGLES:
        ranked = found[f"{block}.mlp.hidden"]
        assert ranked.shape == (48,)
        assert bool(torch.isfinite(ranked).all())


def test_ties_go_to_the_lower_index() -> None:
    assert best_of(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3) == (0, 1, 2)
