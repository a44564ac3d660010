"""Trials of dense compression: scores, closed-form starts, training towards kept features."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import fit, randomise, small_net
from vitrim.method.dcvit.compression import Compression, reconstructed, top_units
from vitrim.method.dcvit.trial_training import trained_tensors
from vitrim.method.dcvit.trials import Trials
from vitrim.network.surgery import cut
from vitrim.plan import Drop, Keep, Plan
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import frozen_parameters
from vitrim.trainer.recipe import Recipe

SINGLES = [("blocks.1",), ("blocks.2",)]
ENDS = {block: f"{block}.mlp.fc2" for (block,) in SINGLES}
NONE = Recipe(epochs=0, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)


def deep(**args: Any) -> nn.Module:
    return small_net(dtype=torch.float32, depth=4, **args)


def loader(n: int = 24) -> DataLoader[Any]:
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, torch.zeros(n, dtype=torch.long)), batch_size=8)


COMPRESSION = Compression(
    width=0.5,
    unit_selection="obs_greedy",
    order_ridge=1e-3,
    reconstruct=True,
    fold_ridge=1e-6,
    seed=0,
)


def tried(net: nn.Module, n: int = 24, *, compression: Any = None, **changes: Any) -> Trials:
    settings: dict[str, Any] = {
        "groups": SINGLES,
        "sampling": Sampling(images=n, tokens=None, class_token_weight=1.0),
        "compression": replace(COMPRESSION, **(compression or {})),
        "recipe": NONE,
        "freeze_tail": True,
        "synthetic": None,
        "distance": "kl",
    }
    phase = Trials(net, **settings | changes)
    fit(phase, loader(n), epochs=phase.epochs)
    return phase


def scores(phase: Trials) -> Tensor:
    return torch.tensor([*phase.evidence().block_scores.values()])


def test_an_attention_that_does_nothing_is_the_easiest_to_lose() -> None:
    net = deep()
    with torch.no_grad():
        for tensor in net.get_submodule("blocks.2.attn.proj").parameters():
            tensor.zero_()
    first, second = scores(tried(net, n=64, compression={"width": 1.0}))
    assert second < 1e-4 * first


@pytest.mark.parametrize("scaled", [False, True])
def test_least_squares_beats_what_is_merely_left(scaled: bool) -> None:
    net = deep(init_values=0.5 if scaled else None)
    solved, unsolved = (
        scores(tried(net, compression={"reconstruct": on}, n=64)) for on in (True, False)
    )
    assert bool((solved < unsolved).all())


def test_the_score_is_the_distance_of_the_network_with_that_block_compressed() -> None:
    net = deep()
    phase = tried(net)
    evidence = phase.evidence()
    site = "blocks.2.mlp.hidden"
    keep = top_units(evidence.scores[site], 24)
    plan = Plan(model={}, edits=(Drop(branch="blocks.2.attn"), Keep(site=site, index=keep)))
    compact = cut(net, plan)
    with torch.no_grad():
        for name, value in reconstructed(compact, plan, evidence, ENDS, 1e-6).items():
            compact.get_parameter(name).copy_(value)
        assert evidence.synthetic is None
        x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
        reference, output = (n(x).log_softmax(-1) for n in (net, compact))
        distance = F.kl_div(output, reference, log_target=True, reduction="batchmean")
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
            reference, output = (n(x).log_softmax(-1) for n in (net, compact))
        distance = F.kl_div(output, reference, log_target=True, reduction="batchmean")
        expected.append(distance.item())
    assert scores(phase).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_convolutional_trial_is_kept_with_what_its_norms_counted() -> None:
    torch.manual_seed(0)
    net = randomise(timm.create_model("resnet18", num_classes=5).float()).eval()
    before = copy.deepcopy(net.state_dict())
    recipe = Recipe(epochs=2, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=1.0)
    phase = tried(net, groups=[("layer1.1",), ("layer2.1",)], recipe=recipe)
    assert phase.evidence().best_trial is not None
    dropped, parameters = phase.evidence().best_trial or ("", torch.empty(0))
    trial = cut(net, Plan(model={}, edits=(Drop(branch=dropped),)))
    tensors = trained_tensors(trial)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, values in zip(tensors, parameters.split(sizes), strict=True):
        tensor.copy_(values.view_as(tensor))
    x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
    with torch.no_grad():
        reference, output = (n(x).log_softmax(-1) for n in (net, trial))
    distance = F.kl_div(output, reference, log_target=True, reduction="batchmean")
    assert scores(phase).min().item() == pytest.approx(distance.item(), rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_group_is_one_trial_of_all_its_blocks() -> None:
    net = deep()
    phase = tried(
        net,
        groups=[("blocks.1", "blocks.2")],
        compression={"width": 1.0, "reconstruct": False},
    )
    compact = cut(net, Plan(model={}, edits=tuple(Drop(branch=f"{b}.attn") for b in ENDS)))
    x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
    with torch.no_grad():
        reference, output = (n(x).log_softmax(-1) for n in (net, compact))
    distance = F.kl_div(output, reference, log_target=True, reduction="batchmean")
    assert scores(phase).tolist() == pytest.approx([distance.item()], rel=1e-4)


def test_groups_train_as_single_blocks_do() -> None:
    recipe = Recipe(epochs=3, lr=2e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=1.0)
    how: dict[str, Any] = {"distance": "mse", "compression": {"reconstruct": False}}
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
        scores(tried(net, recipe=by, distance="mse", compression={"reconstruct": False}))
        for by in (NONE, recipe)
    )
    assert bool((trained < still).all())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_rear_and_the_classifier_stay() -> None:
    names = frozen_parameters(deep(), ["blocks.1"], freeze_tail=True)
    parts = {".".join(name.split(".")[:2]) for name in names}
    assert parts == {"head.weight", "head.bias", "blocks.3"}
    assert frozen_parameters(deep(), ["blocks.1"], freeze_tail=False) == {
        "head.weight",
        "head.bias",
    }
    assert frozen_parameters(deep(), ["blocks.0", "blocks.1"], freeze_tail=True) == names
    assert frozen_parameters(deep(), ["blocks.3"], freeze_tail=True) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("selection", ["obs_greedy", "activation", "random"])
def test_every_way_to_choose_units_ranks_all_of_them(selection: str) -> None:
    unit_scores = tried(deep(), compression={"unit_selection": selection}).evidence().scores
    for (block,) in SINGLES:
        ranked = unit_scores[f"{block}.mlp.hidden"]
        assert ranked.shape == (48,)
        assert bool(torch.isfinite(ranked).all())


def test_ties_go_to_the_lower_index() -> None:
    assert top_units(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3) == (0, 1, 2)


def test_surgeon_is_another_name_of_obs_greedy() -> None:
    greedy, surgeon = (
        tried(deep(), compression={"unit_selection": name}).evidence().scores
        for name in ("obs_greedy", "surgeon")
    )
    assert all(torch.equal(greedy[site], surgeon[site]) for site in greedy)
