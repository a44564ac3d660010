"""Joint compression: symmetries, budgets at their ends, and odd networks."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_joint import N, evidence_of_vit, method, net_of, scored
from torch import Tensor, nn

from contract import subject
from nets import SIZE, images
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.closed_form.moments import MomentsError
from vitrim.errors import ConfigError
from vitrim.method.joint.budgets import Budgets
from vitrim.method.joint.evidence import compensated
from vitrim.network import structure
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Keep, Plan, Proposal
from vitrim.sensitivity.settings import Scaling
from vitrim.trainer.calibrate import Sampling


def planned(
    net: nn.Module, evidence: Evidence, *targets: Target, kinds: tuple[str, ...] = ()
) -> Proposal:
    first, *others = targets
    target = Target(metric=first.metric, keep=first.keep, others=tuple(others))
    return method(*kinds).plan(net, evidence, Cost(net, SIZE), target)


def compact(net: nn.Module, proposal: Proposal, evidence: Evidence) -> nn.Module:
    plan = Plan(model={}, edits=proposal.edits)
    return cut(compensated(net, structure(net), plan, evidence, 1e-6), plan)


def test_permuting_units_permutes_the_plan_and_leaves_the_outputs() -> None:
    ridges = replace(method().ridges, order=0.1)
    joint, net = method("mlp", ridges=ridges), net_of()
    twin, order = copy.deepcopy(net), torch.randperm(48, generator=torch.Generator().manual_seed(1))
    mlp = twin.get_submodule("blocks.0.mlp")
    with torch.no_grad():
        for name in ("fc1.weight", "fc1.bias"):
            mlp.get_parameter(name).copy_(mlp.get_parameter(name)[order])
        mlp.get_parameter("fc2.weight").copy_(mlp.get_parameter("fc2.weight")[:, order])
    kept, outputs = [], []
    for each in (net, twin):
        evidence = scored(joint, each)
        proposal = planned(each, evidence, Target(metric="macs", keep=0.8), kinds=("mlp",))
        kept.append({edit.site: edit.index for edit in proposal.edits if isinstance(edit, Keep)})
        with torch.no_grad():
            outputs.append(compact(each, proposal, evidence)(images(batch=2).double()))
    name = "blocks.0.mlp.hidden"
    assert sorted(order[list(kept[1].pop(name))].tolist()) == list(kept[0].pop(name))
    assert kept[0] == kept[1]
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_a_budget_of_one_leaves_the_network_bit_for_bit() -> None:
    net, evidence = evidence_of_vit()
    proposal = planned(net, evidence, Target(metric="macs", keep=1.0))
    assert proposal.edits == ()
    assert proposal.notes["predicted_kl"] == 0
    same = cut(net, Plan(model={}, edits=()))
    assert all(torch.equal(w, net.get_parameter(name)) for name, w in same.named_parameters())


def test_of_two_budgets_the_plan_names_the_one_that_binds() -> None:
    net, evidence = evidence_of_vit()
    loose, tight = Target(metric="params", keep=0.99), Target(metric="macs", keep=0.7)
    for targets in ((tight, loose), (loose, tight)):
        assert planned(net, evidence, *targets).notes["binding"] == "target.macs=0.7"
    assert "binding" not in planned(net, evidence, tight).notes


def test_budgets_that_exclude_each_other_are_named_together() -> None:
    targets = Target(metric="macs", keep=0.7, others=(Target(metric="params", keep=0.8),))
    budgets = Budgets(Cost(net_of(), SIZE), targets, [], even_heads=False)
    message = str(budgets.unreachable(np.zeros(2)))
    assert message == (
        "target.macs=0.7 cannot be met together with the others; "
        "target.params=0.8 cannot be met together with the others"
    )
    alone = str(budgets.unreachable(np.array([np.inf, 0.0])))
    assert "target.macs=0.7 cannot be reached" in alone
    assert "params" not in alone


def test_without_images_units_of_a_kind_count_alike() -> None:
    net, joint = net_of(), method()
    scorer = joint.scorer(net)
    scorer.on_train_start()
    scorer.on_train_end()
    assert scorer.evidence() == Evidence()
    proposal = planned(net, Evidence(), Target(metric="macs", keep=0.8))
    cost = Cost(net, SIZE)
    plan = Plan(model={}, edits=proposal.edits)
    assert cost.plan(plan).macs <= 0.8 * cost.dense_count.macs
    values = joint.compensation_of(net, cut(net, plan), plan, Evidence())
    assert values == {}


def test_gradients_that_are_not_finite_are_an_error_that_names_the_layer() -> None:
    net = net_of()

    def broken(module: nn.Module, by_input: tuple[Tensor, ...], by_output: object) -> object:
        return (by_input[0] * float("inf"),)

    net.get_submodule("blocks.1.mlp.act").register_full_backward_hook(broken)
    with pytest.raises(MomentsError, match=r"blocks\.\d\.\S+: .*gradients by .* not finite"):
        scored(method(), net)


@pytest.mark.parametrize("layer", ["attn.proj", "mlp.fc2"])
def test_of_sites_without_gradients_all_losses_are_finite_and_least(layer: str) -> None:
    net = net_of()
    with torch.no_grad():
        net.get_parameter(f"blocks.1.{layer}.weight").zero_()
    losses = scored(method("mlp", "qk", "v"), net).scores
    assert all(bool(torch.isfinite(of_site).all()) for of_site in losses.values())
    for kind in ("attn.qk", "attn.v") if "attn" in layer else ("mlp.hidden",):
        assert float(losses[f"blocks.1.{kind}"].max()) < float(losses[f"blocks.0.{kind}"].min())


def test_a_network_in_train_mode_is_scored_in_eval_mode() -> None:
    net, evidence = evidence_of_vit()
    dropping = net_of(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    dropping.load_state_dict(net.state_dict())
    scorer = method().scorer(dropping.train())
    scorer.on_train_start()
    for batch in torch.split(images(batch=N).double(), 8):
        scorer.observe(batch)
    scorer.on_train_end()
    again = scorer.evidence()
    for name, losses in evidence.scores.items():
        assert torch.allclose(again.scores[name], losses, rtol=1e-9)


def test_a_network_in_bfloat16_is_scored_and_compressed() -> None:
    net, evidence = evidence_of_vit()
    rounded = copy.deepcopy(net).to(torch.bfloat16)
    again = scored(method(), rounded)
    for name, losses in evidence.scores.items():
        ranks = torch.stack([x.argsort().argsort().double() for x in (losses, again.scores[name])])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.6
    proposal = planned(rounded, again, Target(metric="macs", keep=0.8))
    small = compact(rounded, proposal, again)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.isfinite(small(images(batch=2).bfloat16())).all()


def test_numbers_of_the_scaling_are_refused_by_their_key() -> None:
    oneshot = subject("oneshot").method
    for scaling in (Scaling(images=-1, shares=[0.5]), Scaling(images=8, shares=[0.5, 0.2])):
        with pytest.raises(ConfigError, match=r"^method\.scaling\.(images|shares)="):
            method(scaling=scaling)
        with pytest.raises(ConfigError, match=r"^method\.losses\.scaling\.(images|shares)="):
            replace(oneshot.losses, scaling=scaling)  # type: ignore[attr-defined]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_losses_are_those_of_the_decision_at_the_temperature(temperature: float) -> None:
    net, _ = evidence_of_vit()
    evidence = scored(method("branches", temperature=temperature), net, 8)
    twin, x = copy.deepcopy(net), images(batch=N).double()[:8]
    with torch.no_grad():
        for parameter in twin.get_submodule("blocks.0.attn.proj").parameters():
            parameter.zero_()
        p, q = ((each(x) / temperature).log_softmax(1) for each in (net, twin))
    divergence = float((p.exp() * (p - q)).sum(1).mean())
    measured = float(evidence.moments["network"]["branches"][0])
    assert measured == pytest.approx(divergence, rel=1e-6)


@pytest.mark.parametrize("kind", ["branches", "int8"])
def test_edits_without_units_follow_their_own_losses(kind: str) -> None:
    net = net_of()
    with torch.no_grad():
        net.get_parameter("blocks.1.attn.proj.weight").zero_()
        net.get_parameter("blocks.1.attn.proj.bias").zero_()
    few = Sampling(images=N, tokens=2, class_token_weight=1.0)
    evidence, cost = scored(method(kind, sampling=few), net), Cost(net, SIZE)
    metric, keep = ("macs", 0.9) if kind == "branches" else ("size_mb", 0.99)
    if metric == "size_mb":
        keep *= cost.total("size_bytes") / 1e6
    first = planned(net, evidence, Target(metric=metric, keep=keep), kinds=(kind,)).edits[0]  # type: ignore[arg-type]
    assert getattr(first, "branch", "blocks.1.attn").startswith("blocks.1.attn")
    assert getattr(first, "linear", "blocks.1.attn.proj").startswith("blocks.1.attn")
