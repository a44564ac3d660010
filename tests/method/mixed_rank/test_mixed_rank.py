"""Mixed-rank compression: budgets, plans, factors and recoveries."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hydra import compose as composed
from hydra import initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from command import QUICK, Command
from nets import MODEL, SIZE, images, outputs, plan_of, relative_error, skeleton_net, small_net
from targets import target_of
from vitrim import LowRank, Plan, count, cut
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.cli.compose import CONF
from vitrim.method.mixed_rank.method import MixedRank
from vitrim.method.mixed_rank.metric import DECOMPOSITIONS
from vitrim.method.mixed_rank.pieces import statistics_of
from vitrim.method.mixed_rank.profile import Profile
from vitrim.method.mixed_rank.regress import Regress
from vitrim.method.mixed_rank.residual import Residual
from vitrim.plan import Evidence
from vitrim.trainer.activations import capture
from vitrim.trainer.mimic import Mimic
from vitrim.trainer.recovery import Recovery

RULES = ("uniform", "energy", "error", "loss")


@cache
def built(*overrides: str) -> MixedRank:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = composed("run", overrides=["method=mixed_rank", *overrides])
    found: MixedRank = instantiate(cfg.method, _convert_="all")
    return found


@cache
def pictures(seed: int = 5, n: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(n, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(low, size=SIZE, mode="bilinear")


@cache
def net() -> nn.Module:
    return small_net(dtype=torch.float32)


@cache
def cost() -> Cost:
    return Cost(net(), SIZE)


KNOWN: dict[str, Evidence] = {}


def learned(phase: Profile) -> Evidence:
    """Return what a phase learns of the pictures, of `net()` once for all tests."""
    if phase.net is not net():
        return _learned(phase)
    key = json.dumps(phase.settings)
    if key not in KNOWN:
        KNOWN[key] = _learned(phase)
    return KNOWN[key]


def _learned(phase: Profile) -> Evidence:
    for at in range(0, 48, 16):
        phase.training_step((pictures()[at : at + 16], None), at)
    phase.on_train_end()
    return phase.evidence()


def planned(method: MixedRank, start: nn.Module, evidence: Evidence, target: Target) -> Plan:
    of_start = cost() if start is net() else Cost(start, SIZE)
    proposal = method.plan(start, evidence, of_start, target)
    return Plan(model={}, edits=proposal.edits)


def compact_of(
    method: MixedRank, start: nn.Module, evidence: Evidence, **target: float
) -> tuple[nn.Module, Plan]:
    plan = planned(method, start, evidence, target_of(method, **target))
    compact = cut(start, plan)
    with torch.no_grad():
        for name, value in method.compensation_of(start, compact, plan, evidence).items():
            compact.get_parameter(name).copy_(value)
    return compact, plan


def test_the_papers_overlay_allocates_up_to_the_break_even_rank() -> None:
    method = built("experiment=mixed_rank/deit_base_paper", "data=none")
    assert (method.allocation, method.max_rank_fraction) == ("energy", 1.0)
    assert built().max_rank_fraction == 0.7


def test_the_figures_have_a_curve_for_each_matrix_of_a_block() -> None:
    method = built("experiment=mixed_rank/figures", "data=none")
    target = Target(metric="params", keep=0.9)
    proposal = method.plan(net(), Evidence(), Cost(net(), SIZE), target)
    names = {
        name.removeprefix("blocks.0.") for name in proposal.diagnostics["curves"] if ".0." in name
    }
    matrices = {"attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert names == matrices


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("qkv", ["fused", "separate"])
def test_every_choice_meets_the_budget_to_within_one_rank(
    decomposition: str, rule: str, qkv: str
) -> None:
    method = replace(built(), decomposition=decomposition, allocation=rule, qkv=qkv)
    compact, plan = compact_of(method, net(), learned(method.scorer(net())), params=0.8)
    limit = int(0.8 * cost().dense_count.params)
    left = cost().plan(plan)
    assert left[:2] == count(compact, SIZE)[:2]
    assert limit - 144 < left.params <= limit  # 144: one rank of the widest layer
    assert bool(torch.isfinite(outputs(compact, images(dtype=torch.float32))).all())


def test_deit_base_without_images_lands_at_40_percent() -> None:
    start = skeleton_net("deit_base_patch16_224")
    cost = Cost(start, 224)
    method = built()
    pieces = method._pieces(cost.structure)
    losses = {name: [1.0] * min(p.rows, p.columns) for name, p in pieces.items()}
    ranks = method._ranks(cost, target_of(method, params=0.4), losses, "uniform")
    assert len(ranks) == 48
    left = cost.cost_of(*_args(cost, ranks))
    assert 34_627_062 - 768 - 3072 < left.params <= 34_627_062


def _args(cost: Cost, ranks: dict[str, int]) -> tuple[Any, ...]:
    from vitrim.network.survivors import propagate

    return propagate(cost.structure, {}), (), ranks


def test_macs_are_a_budget_too() -> None:
    method = built()
    _, plan = compact_of(method, net(), learned(method.scorer(net())), macs=0.7)
    cost = Cost(net(), SIZE)
    assert 0.66 < cost.plan(plan).macs / cost.dense_count.macs <= 0.7


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_with_ranks_full_nothing_is_lost(decomposition: str) -> None:
    method = built(f"method.decomposition={decomposition}", "method.max_rank_fraction=1.0")
    evidence = learned(method.scorer(net()))
    for name, piece in method._pieces(cost().structure).items():
        spectrum = method._spectrum(net(), piece, statistics_of(name, piece, evidence))
        up, down = spectrum.factors(min(piece.rows, piece.columns))
        weight = net().get_parameter(f"{piece.layer}.weight")
        assert relative_error(up @ down, weight) <= 1e-4


def test_the_same_components_lose_less_output_than_those_of_the_plain_svd() -> None:
    aware, plain = built("method.decomposition=centred"), built("method.decomposition=plain")
    evidence = learned(aware.scorer(net()))
    for name, piece in aware._pieces(cost().structure).items():
        with torch.no_grad(), capture(net(), [(piece.layer, False)]) as flows:
            net()(pictures(seed=6))
        x = flows[piece.layer].flatten(0, -2).double()
        x = x - x.mean(0)
        weight = net().get_parameter(f"{piece.layer}.weight").detach().double()

        spectra = (
            aware._spectrum(net(), piece, statistics_of(name, piece, evidence)),
            plain._spectrum(net(), piece, {}),
        )
        for rank in range(1, min(piece.rows, piece.columns) - 4, 4):
            ours, theirs = (
                float((x @ (weight - up.double() @ down.double()).T).square().sum())
                for up, down in (spectrum.factors(rank) for spectrum in spectra)
            )
            assert ours <= theirs, (name, rank)


def test_by_default_outputs_change_less_than_with_uniform_ranks() -> None:
    x = pictures(seed=6)
    dense = outputs(net(), x)
    errors = {}
    for rule in ("loss", "uniform"):
        method = built(f"method.allocation={rule}")
        compact, _ = compact_of(method, net(), learned(method.scorer(net())), params=0.75)
        errors[rule] = float((outputs(compact, x) - dense).square().sum())
    assert errors["loss"] < errors["uniform"]


def test_the_plan_without_images_is_that_of_the_plain_svd() -> None:
    method = built()
    proposal = method.plan(net(), Evidence(), Cost(net(), SIZE), target_of(method, params=0.7))
    assert proposal.notes == {"decomposition": "plain", "allocation": "uniform"}
    plan = Plan(model={}, edits=proposal.edits)
    assert method.compensation_of(net(), cut(net(), plan), plan, Evidence()) == {}


def test_curves_are_there_when_asked_for() -> None:
    method, cost = built("method.curves=true"), Cost(net(), SIZE)
    evidence, target = learned(method.scorer(net())), target_of(method, params=0.8)
    curves = method.plan(net(), evidence, cost, target).diagnostics["curves"]
    assert curves.keys() == method._pieces(cost.structure).keys()
    assert all(curve["rank"][-1] == 24 for curve in curves.values())
    assert all(curve["error"][-1] <= 1e-3 for curve in curves.values())
    assert json.loads(json.dumps(curves, allow_nan=False)) == curves
    assert built().plan(net(), evidence, cost, target).diagnostics == {}


def test_the_mean_is_kept_by_the_bias() -> None:
    method = built("method.layers=[qkv]", "method.allocation=uniform")
    compact, plan = compact_of(method, net(), learned(method.scorer(net())), params=0.9)
    assert len(plan.edits) == 2
    counts = torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0])[:, None]  # of the class token and patches
    means = []
    for module in (net(), compact):
        with torch.no_grad(), capture(module, [("blocks.0.attn.qkv", True)]) as flows:
            module(pictures())
        means.append((counts * flows["blocks.0.attn.qkv"].mean(0)).sum(0))
    assert relative_error(means[1], means[0]) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "phases"),
    [
        ((), [Regress]),
        (("method.regression=false",), []),
        (("method.residual.rank=2", "method.tuning.trained=all"), [Regress, Residual, Mimic]),
        (("method.regression=false", "method.tuning.trained=uncompressed"), [Mimic]),
        (("method.fine_tune=true",), [Regress, Recovery]),
    ],
)
def test_phases_after_the_cut(overrides: tuple[str, ...], phases: list[type]) -> None:
    method = built(*overrides)
    start = small_net()
    factorised = Plan(model=MODEL, edits=(LowRank(linear="blocks.0.mlp.fc1", rank=6),))
    found = [*method.recovery(cut(start, factorised), start, Evidence(), 7)]
    assert [type(phase) for phase in found] == phases


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.layers=[]", r"method\.layers.*qkv, proj, fc1, fc2"),
        ("method.layers=[head]", r"method\.layers.*head"),
        ("method.qkv=x", r"method\.qkv=x.*fused or separate"),
        ("method.decomposition=x", r"method\.decomposition=x.*whitening"),
        ("method.allocation=x", r"method\.allocation=x.*energy"),
        ("method.error_exponent=0", r"method\.error_exponent=0.*above 0"),
        ("method.max_rank_fraction=1.5", r"method\.max_rank_fraction=1\.5.*at most 1"),
        ("method.gradient_images=0", r"method\.gradient_images=0.*from 1"),
        ("method.curves=2", r"method\.curves=2.*true or false"),
        ("method.regression=2", r"method\.regression=2.*true or false"),
        ("method.residual.rank=-1", r"method\.residual\.rank=-1.*from 0"),
        ("method.tuning.trained=x", r"method\.tuning\.trained=x.*uncompressed"),
        ("method.tuning.pooled_weight=-1", r"method\.tuning\.pooled_weight=-1.*from 0"),
        ("method.ridges.metric=0", r"method\.ridges\.metric=0.*above 0"),
        (
            "method.ridges.gradient_shrinkage=1.5",
            r"method\.ridges\.gradient_shrinkage=1\.5.*0\.\.1",
        ),
    ],
)
def test_numbers_that_mean_nothing_are_refused_at_construction(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        built(override)


def test_a_residual_without_a_layer_to_train_is_left_out() -> None:
    method = built("method.residual.rank=2", "method.regression=false")
    start = small_net()
    sliced = plan_of({"blocks.0.mlp.hidden": range(30)})
    edits = (*sliced.edits, LowRank(linear="blocks.0.mlp.fc1", rank=6))
    compact = cut(start, Plan(model=MODEL, edits=edits))
    assert [*method.recovery(compact, start, Evidence(), 7)] == []


def test_without_a_bias_the_mean_is_decomposed_with_the_rest() -> None:
    start = small_net(dtype=torch.float32, qkv_bias=False, proj_bias=False)
    errors = {}
    for decomposition in ("centred", "whitening"):
        method = built(f"method.decomposition={decomposition}")
        compact, _ = compact_of(method, start, learned(method.scorer(start)), params=0.8)
        errors[decomposition] = relative_error(
            outputs(compact, pictures()), outputs(start, pictures())
        )
    assert errors["centred"] <= 2 * errors["whitening"]


@pytest.mark.parametrize("rule", ["loss", "error"])
def test_a_branch_that_matters_nothing_is_given_up_first(rule: str) -> None:
    start = small_net(dtype=torch.float32, init_values=0.5)
    with torch.no_grad():
        start.blocks[0].ls2.gamma.zero_()
    method = built(f"method.allocation={rule}")
    evidence = learned(method.scorer(start))
    plan = planned(method, start, evidence, target_of(method, params=0.85))
    ranks = {edit.linear: edit.rank for edit in plan.low_ranks()}
    assert ranks["blocks.0.mlp.fc1"] <= 2
    assert ranks["blocks.0.mlp.fc2"] <= 2


def test_pieces_left_dense_can_be_factorised_later() -> None:
    plan = Plan(model=MODEL, edits=(LowRank(linear="blocks.0.attn.qkv.q", rank=3),))
    names = built()._pieces(Cost(cut(net(), plan), SIZE).structure)
    assert {"blocks.0.attn.qkv.k", "blocks.0.attn.qkv.v", "blocks.1.attn.qkv"} <= names.keys()


def test_a_budget_out_of_reach_names_the_least_in_reach() -> None:
    with pytest.raises(TargetError, match=r"target\.params=0\.01 cannot be reached: rank 1"):
        built().check(Cost(net(), SIZE), target_of(built(), params=0.01))


def test_a_target_in_units_is_refused() -> None:
    with pytest.raises(TargetError, match=r"target\.units.*params or macs"):
        built().check(Cost(net(), SIZE), target_of(built(), units=100))


def test_ranks_count_from_the_dense_network_where_a_sliced_one_is_begun_with() -> None:
    origin = Cost(net(), SIZE)
    start = cut(net(), plan_of({f"blocks.{i}.mlp.hidden": range(40) for i in (0, 1)}))
    method, cost = built(), Cost(start, SIZE, origin)
    evidence, target = learned(method.scorer(start)), target_of(method, params=0.8)
    plan = Plan(model={}, edits=method.plan(start, evidence, cost, target).edits)
    limit = int(0.8 * origin.dense_count.params)
    assert limit - 144 < cost.plan(plan).params <= limit


def test_the_phases_run_from_the_command_line(command: Command) -> None:
    done = command(
        "method=mixed_rank",
        "target.params=0.8",
        "method.residual.rank=1",
        "method.tuning.trained=uncompressed",
        "method.tuning.training.epochs=1",
        "method.residual.training.epochs=1",
        *QUICK,
    )
    assert done.code == 0, done.message
