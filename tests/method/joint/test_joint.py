"""Joint compression: its losses and bases by hand, and what its networks compute."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn

from command import Command
from contract import subject
from nets import SIZE, images, small_net
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.closed_form.moments import MomentsError
from vitrim.method.joint.evidence import compensated
from vitrim.method.joint.method import Joint
from vitrim.method.joint.settings import JointRidges, LocalTraining
from vitrim.network import structure
from vitrim.network.masking import masked
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Keep, Plan
from vitrim.sensitivity.rotate import rotate_
from vitrim.sensitivity.settings import Scaling
from vitrim.trainer.calibrate import Sampling

N = 24


def method(*kinds: str, images: int = 8, **changes: object) -> Joint:
    ridges = JointRidges(
        order=1e-6, fold=1e-6, regression=1e-6, closing=1.0, metric=1e-9, gradient_shrinkage=0.0
    )
    settings: dict[str, object] = {
        "edits": [*(kinds or ("mlp", "qk", "v", "heads", "branches"))],
        "sampling": Sampling(images=N, tokens=None, class_token_weight=1.0),
        "ridges": ridges,
        "scaling": Scaling(images=images, shares=[0.25, 0.5]),
        "local": LocalTraining(epochs=1, lr=1e-3, batch=64, held_out=0.25),
    }
    return replace(_of_yaml(), **{**settings, **changes})  # type: ignore[arg-type]


@cache
def _of_yaml() -> Joint:
    found = subject("joint").method
    assert isinstance(found, Joint)
    return found


def net_of(name: str = "vit_tiny_patch16_224", **args: object) -> nn.Module:
    return small_net(name, patch_size=8, **args)


def scored(joint: Joint, net: nn.Module, n: int = N) -> Evidence:
    scorer = joint.scorer(net.eval())
    for epoch in range(scorer.epochs):
        for batch in torch.split(images(batch=n).to(next(net.parameters()).dtype), 8):
            scorer.observe(batch, epoch)
    scorer.conclude()
    return scorer.evidence()


@cache
def evidence_of_vit() -> tuple[nn.Module, Evidence]:
    net = net_of()
    return net, scored(method(), net)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_in_other_bases_the_network_computes_the_same(name: str) -> None:
    net = net_of() if name.startswith("vit") else small_swin()
    evidence = scored(method("mlp", "qk", "v"), net)
    described = structure(net)
    bases = {
        name: (site["rows"].double(), site["columns"].double())
        for name, site in evidence.moments.items()
        if "rows" in site
    }
    assert bases.keys() == {n for a in described.attentions for n in (a.qk, a.v)}
    twin = rotate_(copy.deepcopy(net), described, bases)
    x = images(batch=2).to(next(net.parameters()).dtype)
    with torch.no_grad():
        assert torch.allclose(twin(x), net(x), rtol=1e-5, atol=1e-5)
        edits = tuple(
            Keep(site=n, index=tuple(range(0, described.sites[n].size, 2))) for n in bases
        )
        plan = Plan(model={}, edits=edits)
        assert torch.allclose(cut(twin, plan)(x), masked(twin, plan)(x), rtol=1e-9, atol=1e-9)


def small_swin() -> nn.Module:
    return small_net(
        "swin_tiny_patch4_window7_224",
        img_size=SIZE,
        embed_dim=24,
        depths=(1, 1),
        num_heads=(3, 3),
        window_size=4,
        depth=None,
    )


def test_rotating_a_head_changes_neither_losses_nor_outputs() -> None:
    net, evidence = evidence_of_vit()
    described = structure(net)
    twin = copy.deepcopy(net)
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    eye = torch.eye(8, dtype=torch.float64)
    name = "blocks.0.attn.qk"
    rotate_(twin, described, {name: (torch.stack([q, eye, eye]),) * 2})
    again = scored(method(), twin)
    assert torch.allclose(again.scores[name], evidence.scores[name], rtol=1e-2, atol=1e-7)
    cost = Cost(net, SIZE)
    x = images(batch=2).double()
    outputs = []
    for each, found in ((net, evidence), (twin, again)):
        proposal = method().plan(each, found, cost, Target(metric="macs", keep=0.8))
        plan = Plan(model={}, edits=proposal.edits)
        with torch.no_grad():
            outputs.append(cut(compensated(each, described, plan, found, 1e-6), plan)(x))
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_permuting_units_permutes_the_plan() -> None:
    ridges = replace(method().ridges, order=0.1)
    net, joint = net_of(), method("mlp", ridges=ridges)
    evidence = scored(joint, net)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(net)
    mlp = twin.get_submodule("blocks.0.mlp")
    with torch.no_grad():
        for name in ("fc1.weight", "fc1.bias"):
            mlp.get_parameter(name).copy_(mlp.get_parameter(name)[order])
        mlp.get_parameter("fc2.weight").copy_(mlp.get_parameter("fc2.weight")[:, order])
    again = scored(joint, twin)
    name = "blocks.0.mlp.hidden"
    assert torch.allclose(again.scores[name], evidence.scores[name][order], rtol=1e-3)


def test_losses_of_values_and_units_are_those_of_the_moments() -> None:
    net, _ = evidence_of_vit()
    joint = method("mlp", "v", images=0)
    scorer = joint.scorer(net)
    for batch in torch.split(images(batch=N).double(), 8):
        scorer.observe(batch)
    scorer.conclude()
    found = scorer.evidence()
    layer = "blocks.1.attn.proj"
    of_layer = scorer.statistics.of_layer(layer)
    weight = net.get_parameter(f"{layer}.weight").detach().double()
    columns, rows = (found.moments["blocks.1.attn.v"][k].double() for k in ("columns", "rows"))
    error = torch.zeros_like(weight)
    error[:, :8] = weight[:, :8] @ columns[0][:, 5:] @ rows[0][5:]
    expected = torch.trace(of_layer["products"] @ error @ of_layer["cov"] @ error.mT) / 8
    assert float(found.scores["blocks.1.attn.v"][5:8].sum()) == pytest.approx(
        float(expected), rel=1e-3
    )


def test_measured_losses_are_of_the_edits_and_leave_the_network_alone() -> None:
    net = net_of()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evidence = scored(method(), net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    branches = evidence.moments["network"]["branches"]
    x = images(batch=N).double()[:8]
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.get_submodule("blocks.0.attn.proj").parameters():
            parameter.zero_()
        p, q = ((each(x) / 2).log_softmax(1) for each in (net, twin))
    divergence = float((p.exp() * (p - q)).sum(1).mean())
    assert float(branches[0]) == pytest.approx(divergence, rel=1e-6)


def test_a_network_without_a_classifier_is_measured_by_its_features() -> None:
    net = net_of(num_classes=0)
    joint = method()
    assert joint.scorer(net).epochs == 2
    evidence = scored(joint, net)
    assert all(bool((losses >= 0).all()) for losses in evidence.scores.values())
    proposal = joint.plan(net, evidence, Cost(net, SIZE), Target(metric="macs", keep=0.8))
    assert proposal.edits


def test_a_site_whose_gradient_is_zero_goes_first() -> None:
    net = net_of()
    with torch.no_grad():
        net.get_parameter("blocks.1.mlp.fc2.weight").zero_()
    evidence = scored(method("mlp", images=0), net)
    losses = evidence.scores
    assert float(losses["blocks.1.mlp.hidden"].max()) < float(losses["blocks.0.mlp.hidden"].min())


def test_what_is_not_finite_is_named() -> None:
    net = net_of()
    with torch.no_grad():
        net.get_parameter("blocks.1.mlp.fc2.weight")[0, 0] = float("nan")
    with pytest.raises(MomentsError, match=r"blocks\.\d"):
        scored(method(), net)


@pytest.mark.parametrize("n", [1, 2])
def test_few_images_are_enough(n: int) -> None:
    net = net_of()
    joint = method()
    evidence = scored(joint, net, n)
    phase = next(joint.recovery(cut(net, Plan(model={}, edits=())), net, evidence, 7))
    x: Tensor = images(batch=n).double()
    phase.observe(x)  # type: ignore[attr-defined]
    phase.solve()  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.isfinite(phase.net(x)).all()


def test_units_that_a_convolution_reads_are_not_counted_on() -> None:
    small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    cost = Cost(timm.create_model("convnext_atto", conv_mlp=True, **small), SIZE)
    with pytest.raises(TargetError, match=r"method.edits=\['mlp'\]: this network has none"):
        method("mlp").check(cost, Target(metric="macs", keep=0.9))
    linear = Cost(timm.create_model("convnext_atto", conv_mlp=False, **small), SIZE)
    method("mlp").check(linear, Target(metric="macs", keep=0.9))


def test_a_recovery_that_cannot_be_is_refused_by_its_key(command: Command) -> None:
    done = command("method=joint", "method.tuning.recovery.ema=2", "data=none", "target.macs=0.7")
    assert done.code == 1
    assert "method.tuning.recovery.ema=2" in done.message
