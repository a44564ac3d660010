"""One-shot pruning: the published structures exactly, and properties of its plans."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from calibration import calibrated
from nets import SIZE, skeleton_net, small_net
from targets import target_of
from vitrim.budget.cost import Cost
from vitrim.budget.target import TargetError
from vitrim.cli.compose import CONF
from vitrim.method.oneshot import OneShot, trimmed
from vitrim.paper import flops_blog
from vitrim.plan import Evidence, Plan
from vitrim.trainer.calibrate import Calibrate
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Distill, Mimic
from vitrim.trainer.recovery import Recovery
from vitrim.trainer.refit import Refit

SIZES = {
    "vit_base_patch16_224": 224,
    "deit_base_patch16_224": 224,
    "dinov2_vits14_lc": 644,
}
ROWS = [
    ("vit_base_patch16_224", 0, 86_567_656, 35_127_656_448, "82.56"),
    ("vit_base_patch16_224", 1, 77_434_802, 31_531_653_120, "73.85"),
    ("vit_base_patch16_224", 3, 65_115_747, 26_681_103_360, "62.10"),
    ("vit_base_patch16_224", 5, 54_336_766, 22_436_947_968, "51.82"),
    ("deit_base_patch16_224", 0, 86_567_656, 35_127_656_448, "82.56"),
    ("deit_base_patch16_224", 1, 78_403_112, 31_912_919_040, "74.77"),
    ("deit_base_patch16_224", 3, 67_218_363, 27_508_995_072, "64.10"),
    ("deit_base_patch16_224", 5, 57_355_434, 23_625_529_344, "54.70"),
    ("dinov2_vits14_lc", 0, 23_977_576, 91_096_848_384, "22.87"),
    ("dinov2_vits14_lc", 1, 22_843_301, 86_300_573_184, "21.79"),
    ("dinov2_vits14_lc", 3, 19_883_420, 73_784_733_696, "18.96"),
    ("dinov2_vits14_lc", 5, 17_727_144, 64_666_933_248, "16.91"),
]


@cache
def built(method: str, *overrides: str) -> OneShot:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={method}", *overrides])
    found: OneShot = instantiate(cfg.method, _convert_="all")
    return found


@cache
def cost_of(name: str) -> Cost:
    return Cost(skeleton_net(name), SIZES[name])


@pytest.mark.parametrize(("name", "strength", "params", "flops", "size_mb"), ROWS)
def test_the_published_rows_come_out_to_the_last_digit(
    name: str, strength: int, params: int, flops: int, size_mb: str
) -> None:
    cost = cost_of(name)
    method = built("aiminify", "model=timm", f"model.name={name}")
    target = target_of(method, strength)
    sites = [site for site in cost.structure.sites if site.endswith("mlp.hidden")]
    generator = torch.Generator().manual_seed(strength)
    if strength:
        scores = {
            site: torch.rand(cost.structure.sites[site].size, generator=generator) for site in sites
        }
        plan = Plan(model={}, edits=trimmed(method, cost, scores, target))
    else:
        assert target.is_identity
        plan = Plan(model={}, edits=())
    left = cost.plan(plan)
    counted = flops_blog(name, cost, plan) or 2 * left.macs
    assert (left.params, counted) == (params, flops)
    assert f"{left.params / 2**20:.2f}" == size_mb


def test_the_blog_misses_most_of_the_attention_of_dinov2() -> None:
    cost = cost_of("dinov2_vits14_lc")
    assert 2 * cost.plan(Plan(model={}, edits=())).macs == 173_469_216_768


@pytest.mark.parametrize(
    ("model", "removed"),
    [
        ("vit_tiny_patch16_224", 0.16118706597222),
        ("deit3_small_patch16_224", 0.14409722222222),
        ("dinov2_vits14_lc", 0.08002387152777),
        ("vit_small_patch14_dinov2", 0.16118706597222),
    ],
)
def test_the_table_is_that_of_the_models_family(model: str, removed: float) -> None:
    method = built("aiminify", "model=timm", f"model.name={model}")
    assert target_of(method, 1).keep == pytest.approx(1 - removed)


def test_a_name_without_a_table_is_refused() -> None:
    with pytest.raises(Exception, match=r"method\.tables.*deit, dinov2.*vit_tiny"):
        built("aiminify", "~method.tables.default")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.criterion=x", r"method\.criterion=x.*obs_greedy"),
        ("method.compensation=x", r"method\.compensation=x.*sequential"),
        ("method.sites=[]", r"method\.sites=\[\].*mlp, heads, qk, v"),
        ("method.sites=[mlp,nose]", r"method\.sites.*nose.*expected"),
        ("method.scope=x", r"method\.scope=x"),
        ("method.site_rates.qk=0", r"method\.site_rates=.*above 0"),
        ("method.round_to=0", r"method\.round_to=0"),
        ("method.fine_tune=3", r"method\.fine_tune=3"),
        ("method.sampling.images=0", r"method\.sampling\.images=0.*from 1"),
        ("method.ridges.fold=0", r"method\.ridges\.fold=0"),
        ("method.tuning.objective=x", r"method\.tuning\.objective=x.*mimic"),
        ("method.tuning.temperature=0", r"method\.tuning\.temperature=0"),
        ("method.tuning.recovery.ema=1", r"method\.tuning\.recovery\.ema=1"),
        ("method.tuning.recovery.views.crop=2", r"method\.tuning\.recovery\.views\.crop=2"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_at_construction(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        built("oneshot", override)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("[0,1,3,2,4,5]", r"levels.*below the one before"),
        ("[1,2,3,4,5,6]", r"levels.*the first 1"),
        ("[0,2,4,6,8,10]", r"levels.*above 0"),
    ],
)
def test_a_table_that_does_not_rise_below_all_units_is_refused(removed: str, message: str) -> None:
    method = built("oneshot", f"method.tables.default={{of:10,removed:{removed}}}")
    with pytest.raises(TargetError, match=message):
        target_of(method)


def test_the_former_name_of_a_criterion_is_accepted() -> None:
    assert built("oneshot", "method.criterion=surgeon") == built("oneshot")
    assert built("oneshot").criterion == "obs_greedy"


def test_a_unit_target_above_what_exists_is_refused() -> None:
    method = built("oneshot")
    with pytest.raises(TargetError, match=r"target\.units=97.*96"):
        method.check(Cost(small_net(), SIZE), target_of(method, units=97))


def test_sites_that_the_network_does_not_have_are_refused() -> None:
    method = built("oneshot", "method.sites=[mlp,channels]")
    with pytest.raises(TargetError, match=r"method\.sites=.*has, mlp, heads, qk, v"):
        method.check(Cost(small_net(), SIZE), target_of(method))


@pytest.mark.parametrize("criterion", ["obs_greedy", "obs", "output_energy", "group_l2"])
def test_plans_of_every_site_meet_a_macs_target(criterion: str) -> None:
    net = small_net()
    cost = Cost(net, SIZE)
    method = built(
        "oneshot",
        "method.sites=[mlp,heads,qk,v]",
        f"method.criterion={criterion}",
    )
    names = [name for name in cost.structure.sites if not name.endswith("input")]
    proposal = method.plan(net, calibrated(net, names), cost, target_of(method, macs=0.7))
    plan = Plan(model={}, edits=proposal.edits)
    assert {edit.site.split(".")[-1] for edit in plan.keeps()} >= {"hidden", "qk"}
    assert cost.plan(plan).macs <= 0.7 * cost.dense_count.macs
    assert proposal.notes == {"criterion": criterion, "compensation": "sequential"}


def test_without_images_units_are_ranked_by_their_weights() -> None:
    net = small_net()
    method = built("oneshot")
    proposal = method.plan(net, Evidence(), Cost(net, SIZE), target_of(method))
    assert proposal.edits
    assert proposal.notes["criterion"] == "group_l2"


@pytest.mark.parametrize(
    ("overrides", "phases"),
    [
        ((), [Refit]),
        (("method.compensation=ridge",), []),
        (("method.fine_tune=true",), [Refit, Recovery]),
        (("method.fine_tune=true", "method.tuning.objective=mimic"), [Refit, Mimic]),
        (("method.fine_tune=true", "method.tuning.objective=distill"), [Refit, Distill]),
        (
            ("method.fine_tune=true", "method.compensation=none", "method.tuning.objective=labels"),
            [Classify],
        ),
    ],
)
def test_phases_after_the_cut(overrides: tuple[str, ...], phases: list[type]) -> None:
    method = built("oneshot", *overrides)
    found = method.recovery(small_net(), small_net(), Evidence(), 7)
    assert [type(phase) for phase in found] == phases


def test_aiminify_needs_no_images_to_rank() -> None:
    phase = built("aiminify").scorer(small_net())
    assert isinstance(phase, Calibrate)
    assert phase.epochs == 0
    assert isinstance(built("oneshot").scorer(small_net()), Calibrate)


def test_the_calibration_serves_every_criterion_without_gradients() -> None:
    settings: list[Mapping[str, Any]] = [
        built("oneshot", *overrides).scorer(small_net()).settings
        for overrides in ((), ("method.criterion=variance",))
    ]
    assert settings[0] == settings[1]


@pytest.mark.parametrize(
    "criterion", ["obs_greedy", "obs", "variance", "output_energy", "magnitude"]
)
def test_units_in_another_order_are_the_same_units_in_the_plan(criterion: str) -> None:
    site = "blocks.0.mlp.hidden"
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    net, moved = small_net(), small_net()
    with torch.no_grad():
        mlp, its = net.blocks[0].mlp, moved.blocks[0].mlp
        its.fc1.weight.copy_(mlp.fc1.weight[order])
        its.fc1.bias.copy_(mlp.fc1.bias[order])
        its.fc2.weight.copy_(mlp.fc2.weight[:, order])
    method = built("oneshot", f"method.criterion={criterion}")
    target = target_of(method, units=60)
    sites = [site, "blocks.1.mlp.hidden"]
    edits = [
        method.plan(n, calibrated(n, sites), Cost(n, SIZE), target).edits for n in (net, moved)
    ]
    kept, its_kept = (
        next(keep.index for keep in Plan(model={}, edits=of_net).keeps() if keep.site == site)
        for of_net in edits
    )
    assert len(kept) == 30
    assert sorted(order[list(its_kept)].tolist()) == list(kept)


@pytest.mark.parametrize(
    ("overrides", "set_target"), [((), {}), (("method.round_to=8",), {"macs": 0.9})], ids=str
)
def test_ranking_only_what_is_removed_changes_no_plan(
    overrides: tuple[str, ...], set_target: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_net()
    method, cost = built("oneshot", *overrides), Cost(net, SIZE)
    evidence = calibrated(net, ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden"])
    target = target_of(method, **set_target)
    proposal = method.plan(net, evidence, cost, target)
    removed = method._n_removed(cost, target)
    assert proposal.edits
    keeps = Plan(model={}, edits=proposal.edits).keeps()
    assert all(len(keep.index) + removed[keep.site] == 48 for keep in keeps)
    monkeypatch.setattr(OneShot, "_n_removed", lambda self, cost, target: {})
    assert method.plan(net, evidence, cost, target) == proposal
