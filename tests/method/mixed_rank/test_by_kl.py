"""Ranks by predicted KL divergence: budgets, factors, and what is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from command import QUICK, Command
from contract import subject
from nets import SIZE, images, small_net
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.errors import ConfigError
from vitrim.method.mixed_rank.method import MixedRank
from vitrim.method.mixed_rank.settings import RankLosses
from vitrim.network.masking import masked
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Keep, Plan
from vitrim.trainer.calibrate import Sampling


@cache
def method() -> MixedRank:
    found = subject("mixed_rank").method
    assert isinstance(found, MixedRank)
    return replace(
        found,
        allocation="kl",
        losses=RankLosses(temperature=2.0, images=8),
        sampling=Sampling(images=16, tokens=None, class_token_weight=1.0),
    )


def scored(by_kl: MixedRank, net: nn.Module, n: int = 16) -> Evidence:
    scorer = by_kl.scorer(net)
    scorer.on_train_start()
    for batch in torch.split(images(batch=n).to(next(net.parameters()).dtype), 8):
        scorer.observe(batch)  # type: ignore[union-attr]
    scorer.on_train_end()
    return scorer.evidence()


def compact_of(by_kl: MixedRank, net: nn.Module, evidence: Evidence, keep: float) -> nn.Module:
    plan = plan_of(by_kl, net, evidence, keep)
    compact = cut(net, plan)
    with torch.no_grad():
        for name, value in by_kl.compensation_of(net, compact, plan, evidence).items():
            compact.get_parameter(name).copy_(value)
    return compact


def plan_of(by_kl: MixedRank, net: nn.Module, evidence: Evidence, keep: float) -> Plan:
    target = Target(metric="params", keep=keep)
    return Plan(model={}, edits=by_kl.plan(net, evidence, Cost(net, SIZE), target).edits)


@cache
def dense() -> tuple[nn.Module, Evidence]:
    net = small_net(patch_size=8)
    return net, scored(method(), net)


def test_more_budget_never_predicts_more_loss() -> None:
    net, evidence = dense()
    cost, before = Cost(net, SIZE), float("inf")
    for step in range(60, 101, 2):
        target = Target(metric="params", keep=step / 100)
        proposal = method().plan(net, evidence, cost, target)
        assert cost.plan(Plan(model={}, edits=proposal.edits)).params <= cost.limit(target)
        lost = proposal.notes["predicted_kl"]
        assert isinstance(lost, float | int)
        assert 0 <= lost <= before
        before = lost
    assert before == 0


def test_a_cut_network_computes_what_the_masked_one_does() -> None:
    net, evidence = dense()
    plan = plan_of(method(), net, evidence, 0.8)
    assert plan.low_ranks()
    x = images(batch=2).double()
    with torch.no_grad():
        assert torch.allclose(cut(net, plan)(x), masked(net, plan)(x), rtol=1e-9, atol=1e-9)


def test_losses_are_those_of_the_factors_and_were_measured() -> None:
    net, evidence = dense()
    proposal = method().plan(net, evidence, Cost(net, SIZE), Target(metric="params", keep=0.8))
    table = proposal.diagnostics["losses"]
    assert {row["kind"] for row in table} == {"ranks"}
    assert len(table) == 8
    by_kl, x = method(), images(batch=16).double()
    errors = []
    for keep in (0.95, 0.8):
        with torch.no_grad():
            p, q = (
                (m(x) / 2).log_softmax(1) for m in (net, compact_of(by_kl, net, evidence, keep))
            )
        errors.append(float((p.exp() * (p - q)).sum(1).mean()))
    assert errors[0] < errors[1] < 0.1


def test_only_the_chosen_layers_are_scored() -> None:
    net = small_net(patch_size=8)
    only = replace(method(), layers=["fc1"])
    evidence = scored(only, net, 4)
    assert evidence.scores.keys() == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}


def test_a_network_that_is_cut_already_or_has_no_biases_is_factorised() -> None:
    bare = small_net(patch_size=8, qkv_bias=False, proj_bias=False)
    edits = (
        Keep(site="blocks.0.mlp.hidden", index=tuple(range(0, 48, 2))),
        Keep(site="blocks.1.attn.v", index=tuple(range(20))),
    )
    for net in (bare, cut(small_net(patch_size=8), Plan(model={}, edits=edits))):
        compact = compact_of(method(), net, scored(method(), net, 8), 0.8)
        with torch.no_grad():
            assert torch.isfinite(compact(images(batch=2).double())).all()


def test_without_images_every_layer_keeps_the_same_fraction() -> None:
    net, _ = dense()
    uniform = replace(method(), allocation="uniform")
    assert plan_of(method(), net, Evidence(), 0.8) == plan_of(uniform, net, Evidence(), 0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": "separate"}, r"method\.qkv=separate: expected fused, with method\.allocation=kl"),
        ({"decomposition": "asvd"}, r"method\.decomposition=asvd: expected loss, with .*kl"),
        ({"curves": True}, r"method\.curves=true: expected false, with method\.allocation=kl"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(method(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("temperature", "images", "message"),
    [
        (0.0, 8, r"method\.losses\.temperature=0\.0.*above 0"),
        (2.0, -1, r"method\.losses\.images=-1.*from 0 on"),
    ],
)
def test_choices_of_losses_are_checked(temperature: float, images: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankLosses(temperature=temperature, images=images)


def test_ranks_by_kl_run_from_the_command_line(command: Command) -> None:
    done = command(
        "method=mixed_rank", "method.allocation=kl", "method.losses.images=4", "target.params=0.8",
        *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.message
