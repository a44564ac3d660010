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

from nets import fit, randomise, small_net
from vitrim.files import digest
from vitrim.method.dcvit.compression import (
    Compression,
    edits_of,
    reconstructed,
    redrawn,
    shape_of_trial,
    top_units,
)
from vitrim.method.dcvit.mlp_statistics import CompressedMLP, MLPStatistics
from vitrim.method.dcvit.trial_training import TrialRecipe, TrialTraining, trained_tensors
from vitrim.method.dcvit.trials import Trials
from vitrim.network import structure
from vitrim.network.surgery import cut
from vitrim.plan import Drop, Keep, Plan
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import FeatureLoss, frozen_parameters
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
    init_std=0.02,
    seed=0,
)


def tried(
    net: nn.Module,
    n: int = 24,
    *,
    compression: Any = None,
    recipe: Recipe = NONE,
    loss: FeatureLoss | None = None,
    **changes: Any,
) -> Trials:
    settings: dict[str, Any] = {
        "groups": SINGLES,
        "sampling": Sampling(images=n, tokens=None, class_token_weight=1.0),
        "compression": replace(COMPRESSION, **(compression or {})),
        "recipe": TrialRecipe(
            training=recipe, views="plain", loss=loss or FeatureLoss(), freeze_tail=True
        ),
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


def trial_nets(monkeypatch: pytest.MonkeyPatch, net: nn.Module, **changes: Any) -> list[nn.Module]:
    """Return the networks of the trials as their training begins."""
    begun: list[nn.Module] = []

    class Spy(TrialTraining):
        def __init__(self, net: nn.Module, *args: Any, **options: Any) -> None:
            begun.append(copy.deepcopy(net))
            super().__init__(net, *args, **options)

    monkeypatch.setattr("vitrim.method.dcvit.trials.TrialTraining", Spy)
    tried(net, recipe=replace(NONE, epochs=1), **changes)
    return begun


def test_redrawn_mlps_are_redrawn_in_trials_as_they_are_in_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = deep()
    how = {"unit_selection": "none", "reconstruct": False, "seed": 3}
    for (block,), trial in zip(SINGLES, trial_nets(monkeypatch, net, compression=how), strict=True):
        plan = Plan(model={}, edits=tuple(Drop(branch=f"{b}.attn") for b in ENDS))
        values = redrawn(cut(net, plan), plan, std=0.02, seed=3)
        assert {name.rpartition(".mlp.")[0] for name in values} == set(ENDS)
        path = f"{block}.mlp.fc2.bias"
        assert torch.equal(trial.get_parameter(path), values[path])
        weight = trial.get_parameter(f"{block}.mlp.fc1.weight")
        assert 0.01 < weight.std() < 0.03
        dense = net.get_parameter(f"{block}.mlp.fc1.weight")
        assert (F.normalize(weight, dim=1) @ F.normalize(dense, dim=1).T).max() < 0.95


def test_a_block_that_keeps_all_units_is_redrawn_as_well() -> None:
    net = deep()
    plan = Plan(model={}, edits=(Drop(branch="blocks.1.attn"),))
    one, same, other = (redrawn(cut(net, plan), plan, std=0.02, seed=s) for s in (0, 0, 1))
    assert set(one) == {f"blocks.1.mlp.{n}.{p}" for n in ("fc1", "fc2") for p in ("weight", "bias")}
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["blocks.1.mlp.fc1.weight"], other["blocks.1.mlp.fc1.weight"])


def test_a_trial_mimics_what_the_tuning_does() -> None:
    recipe = Recipe(epochs=8, lr=3e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)
    net, how = deep(), {"reconstruct": False}
    x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
    shares = []
    for loss in (FeatureLoss(), FeatureLoss(token_weight=0.0, pooled_weight=1.0)):
        evidence = tried(net, recipe=recipe, loss=loss, compression=how).evidence()
        assert evidence.best_trial is not None
        first, values = evidence.best_trial
        shape = shape_of_trial(structure(net), (first,), 0.5)
        trial = cut(net, Plan(model={}, edits=edits_of(structure(net), shape, evidence.scores)))
        tensors = trained_tensors(trial)
        parts = values.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        with torch.no_grad():
            errors = (net.forward_features(x) - trial.forward_features(x)).square().mean((0, 2))
        shares.append((errors[0] / errors[1:].mean()).item())
    assert shares[1] < 0.5 * shares[0]


@pytest.mark.parametrize(
    ("selection", "reconstruct", "kept"),
    [
        ("obs_greedy", True, {"cov", "mean", "weight"}),
        ("obs_greedy", False, {"cov", "mean", "weight"}),
        ("activation", False, {"mean", "weight"}),
        ("random", False, set()),
        ("none", False, set()),
    ],
)
def test_nothing_is_stored_that_nothing_reads(
    selection: str, reconstruct: bool, kept: set[str]
) -> None:
    how = {"unit_selection": selection, "reconstruct": reconstruct}
    phase = tried(deep(), compression=how)
    stored = {
        name: tensor
        for name, tensor in phase.state_dict().items()
        if name.startswith("statistics.")
    }
    assert {name.replace("/", ".").rpartition(".")[2] for name in stored} == kept
    largest = max((tensor.numel() for tensor in stored.values()), default=0)
    units = 48 + 24 * reconstruct
    sizes = {"cov": units**2, "mean": units}
    assert largest == next((size for part, size in sizes.items() if part in kept), 0)


def test_a_distance_of_features_is_their_squared_error() -> None:
    net = deep()
    phase = tried(net, distance="mse", compression={"width": 1.0, "reconstruct": False})
    x = loader().dataset.tensors[0]  # type: ignore[attr-defined]
    for (block,), score in zip(SINGLES, scores(phase).tolist(), strict=True):
        compact = cut(net, Plan(model={}, edits=(Drop(branch=f"{block}.attn"),)))
        with torch.no_grad():
            expected = F.mse_loss(compact.forward_features(x), net.forward_features(x))
        assert score == pytest.approx(expected.item(), rel=1e-4)


def test_statistics_of_mlps_within_autocast_are_those_of_full_precision() -> None:
    net, mlp = deep(), CompressedMLP("blocks.1.attn", "blocks.1.mlp", "blocks.1.mlp.fc2")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(images=4, tokens=None, class_token_weight=1.0)
    found = []
    for enabled in (False, True):
        statistics = MLPStatistics(net, [mlp], "regression", sampling)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            statistics.add(net, images)
        statistics.finish()
        found.append(statistics.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def test_numbers_that_came_later_do_not_rename_what_trials_found() -> None:
    recipe = replace(NONE, epochs=1)
    trial = TrialRecipe(training=recipe, views="plain", loss=FeatureLoss(), freeze_tail=False)
    assert digest(trial.settings()) == "1fc0543c"  # of version 0.2.0
