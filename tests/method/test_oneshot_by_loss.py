"""One-shot pruning by predicted loss: its orders, its budgets, and what it refuses."""

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from torch import nn

from contract import subject
from nets import SIZE, images, randomise, small_net
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.closed_form.importance import importance
from vitrim.errors import ConfigError
from vitrim.method.oneshot import OneShot
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Plan
from vitrim.prune import Slicing
from vitrim.sensitivity.ordered import order_of
from vitrim.sensitivity.settings import Scaling
from vitrim.trainer.calibrate import Calibrate, Sampling


def method(**changes: object) -> OneShot:
    settings: dict[str, object] = {
        "scope": "loss",
        "sites": ["mlp", "qk"],
        "sampling": Sampling(images=16, tokens=None, class_token_weight=1.0),
    }
    of_yaml = _of_yaml()
    scaling = Scaling(images=4, shares=[0.5])
    losses = replace(of_yaml.losses, scaling=scaling)
    return replace(of_yaml, **{"losses": losses, **settings, **changes})  # type: ignore[arg-type]


@cache
def _of_yaml() -> OneShot:
    found = subject("oneshot").method
    assert isinstance(found, OneShot)
    return found


def scored(oneshot: OneShot, net: nn.Module, n: int = 16) -> Evidence:
    scorer = oneshot.scorer(net)
    _observe(scorer, n)
    return scorer.evidence()


def _observe(scorer: Calibrate, n: int) -> None:
    """Pass images as the trainer does, once."""
    scorer.on_train_start()
    for index, batch in enumerate(torch.split(images(batch=n).double(), 8)):
        scorer.training_step((batch, batch), index)
    scorer.on_train_end()


@pytest.mark.parametrize("compensation", ["none", "bias", "sequential"])
@pytest.mark.parametrize("sites", [["mlp", "qk"], ["v"], ["heads", "mlp"]])
def test_units_go_in_the_order_of_the_criterion(sites: list[str], compensation: str) -> None:
    net = small_net(patch_size=8)
    oneshot, cost = method(sites=sites, compensation=compensation), Cost(net, SIZE)
    evidence = scored(oneshot, net)
    assert all(bool((losses > 0).all()) for losses in evidence.scores.values())
    for name, losses in evidence.scores.items():
        ranked = importance(
            net,
            cost.structure,
            evidence.moments,
            cost.structure.sites[name],
            criterion=oneshot.criterion,
            ridge=oneshot.ridges.order,
            seed=0,
        )
        assert losses[order_of(ranked)].diff().min() > 0
    target = Target(metric="macs", keep=0.8)
    proposal = oneshot.plan(net, evidence, cost, target)
    plan = Plan(model={}, edits=proposal.edits)
    left = cost.plan(plan).macs / cost.dense_count.macs
    assert 0.75 < left <= 0.8
    lost = float(proposal.notes["predicted_kl"])  # type: ignore[arg-type]
    more = oneshot.plan(net, evidence, cost, Target(metric="macs", keep=0.7))
    assert 0 < lost < float(more.notes["predicted_kl"])  # type: ignore[arg-type]
    values = oneshot.compensation_of(net, cut(net, plan), plan, evidence)
    assert all(bool(torch.isfinite(value).all()) for value in values.values())


def test_a_site_that_nothing_depends_on_goes_first() -> None:
    net = small_net(patch_size=8)
    with torch.no_grad():
        net.get_parameter("blocks.1.mlp.fc2.weight").zero_()
    oneshot = method(sites=["mlp"])
    proposal = oneshot.plan(
        net, scored(oneshot, net), Cost(net, SIZE), Target(metric="units", keep=0.6)
    )
    assert [edit.site for edit in proposal.edits] == ["blocks.1.mlp.hidden"]


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_networks_of_many_families_are_cut_within_the_budget(name: str) -> None:
    swin = {"img_size": SIZE, "embed_dim": 24, "depths": (1, 1), "num_heads": (3, 3)}
    args = {**swin, "window_size": 4, "depth": None} if "swin" in name else {"patch_size": 8}
    net = small_net(name, **args)
    oneshot, cost = method(sites=["mlp"]), Cost(net, SIZE)
    prune = Slicing(oneshot, cost, Target(metric="params", keep=0.9))
    scorer = oneshot.scorer(net)
    _observe(scorer, 8)
    prune.apply(scorer)
    assert cost.plan(prune.plan).params <= 0.9 * cost.dense_count.params
    with torch.no_grad():
        assert torch.isfinite(prune.compact(images(batch=2).double())).all()


def test_without_a_classifier_images_are_seen_twice() -> None:
    assert method().scorer(small_net(patch_size=8, num_classes=0).eval()).epochs == 2


def test_without_images_every_site_loses_the_same_fraction() -> None:
    net = small_net(patch_size=8)
    target = Target(metric="units", keep=0.5)
    by_loss, by_site = (
        method(sites=["mlp"], scope=scope).plan(net, Evidence(), Cost(net, SIZE), target)
        for scope in ("loss", "site")
    )
    assert by_loss == by_site


def test_what_has_no_losses_is_refused() -> None:
    args = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_classes": 7, "conv_mlp": True}
    net = randomise(timm.create_model("convnext_tiny", pretrained=False, **args).double())
    with pytest.raises(ConfigError, match=r"scope=loss.*no Linear reads"):
        method(sites=["mlp"]).scorer(net)
    cost = Cost(randomise(timm.create_model("resnet18", num_classes=7).double()), SIZE)
    with pytest.raises(TargetError, match=r"scope=loss.*channels"):
        method(sites=["channels"]).check(cost, Target(metric="macs", keep=0.8))
