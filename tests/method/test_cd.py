from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import TINY, images, outputs, plan_of, randomise, relative_error
from targets import target_of
from vitrim import Keep, Plan, cut
from vitrim.budget.cost import Cost
from vitrim.closed_form.importance import consumer_of
from vitrim.errors import ConfigError
from vitrim.method.cd import (
    CD,
    _max_eigenvalue,
    _minimum,
    _patches,
    cross_distilled,
    grams,
    survival_steps,
)
from vitrim.network import sites, structure
from vitrim.plan import Evidence
from vitrim.trainer.recipe import Recipe

SMALL = {"layers": [1, 2, 1, 1], "channels": [8, 8, 8, 8], "num_classes": 7}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "resnet": ("resnet18", SMALL),
    "bottleneck": ("resnet50", SMALL),
    "mobilenet": ("mobilenetv2_035", {"depth_multiplier": 0.3, "num_classes": 7}),
}
family = pytest.mark.parametrize("kind", MODELS)
X = images(batch=10)
POWER: dict[str, Any] = {"power_iterations": 30, "step_margin": 1.1}


def cd(**changes: Any) -> CD:
    settings: dict[str, Any] = {
        "levels": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],
        "sites": ["mlp", "channels"],
        "scope": "site",
        "round_to": 1,
        "images": 6,
        "samples_per_image": 64,
        "mu": 0.6,
        "steps": 20,
        "power_iterations": 30,
        "step_margin": 1.1,
        "ridge": 1e-9,
        "fine_tuning": Recipe(epochs=0, lr=0.0, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0),
    }
    return CD(**{**settings, **changes})


def small_net(kind: str) -> nn.Module:
    name, args = MODELS[kind]
    return randomise(timm.create_model(name, **args).double())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evidence() -> Evidence:
    return Evidence(images=X)


def halves(net: nn.Module) -> Plan:
    """Keep every other unit of the sites that the method prunes."""
    ours = [n for n in sites(net) if n.endswith(("mlp.hidden", ".channels"))]
    return plan_of({name: range(0, sites(net)[name].size, 2) for name in ours})


def test_the_minimum_is_that_of_both_losses() -> None:
    """Written out, the loss of a 3x3 convolution has no slope where `_minimum` puts it."""
    dense, kept = random(4, 5, 3, 3), torch.tensor([0, 2, 3])
    conv = nn.Conv2d(5, 4, 3, padding=1)
    teacher, student = random(3, 5, 6, 6, seed=1), random(3, 5, 6, 6, seed=2)
    rows = [_patches(conv, x).flatten(0, 1) for x in (teacher, student)]
    gram = 0.6 * rows[0].T @ rows[0] + 0.4 * rows[1].T @ rows[1]
    found = _minimum(dense, gram, kept, 1e-13).requires_grad_()
    assert found.shape == (4, 3, 3, 3)
    loss = torch.zeros(())
    for share, x in ((0.6, teacher), (0.4, student)):
        aim = F.conv2d(x, dense, padding=1)
        loss = loss + share * (F.conv2d(x[:, kept], found, padding=1) - aim).square().sum()
    slope = torch.autograd.grad(loss, found)[0]
    assert slope.abs().max() <= 1e-8 * loss.detach()


def test_patches_times_weights_are_the_convolution() -> None:
    conv = nn.Conv2d(5, 4, 3, padding=1, stride=2, dilation=2, bias=False).double()
    x = random(2, 5, 9, 9)
    expected = conv(x).flatten(2).transpose(1, 2)
    assert relative_error(_patches(conv, x) @ conv.weight.flatten(1).T, expected) <= 1e-12


def test_the_largest_eigenvalue_is_not_underestimated() -> None:
    rows = random(40, 12)
    gram = rows.T @ rows
    assert 1 <= _max_eigenvalue(gram, 30, 1.1) / float(torch.linalg.eigvalsh(gram)[-1]) <= 1.2


def test_channels_that_say_nothing_or_are_hardly_read_go_first() -> None:
    x = random(200, 6)
    x[:, 4] = 0.0  # never anything there
    weight = random(5, 6, seed=1)
    weight[:, 1] *= 1e-3  # hardly read
    survival = survival_steps(weight, x.T @ x, steps=60, **POWER)
    assert set(survival.argsort()[:2].tolist()) == {1, 4}
    assert len(set(survival.tolist())) == 6


def test_channels_survive_by_the_schedule() -> None:
    x, weight = random(200, 10), random(5, 10, seed=1)
    survival = survival_steps(weight, x.T @ x, steps=9, **POWER)
    assert sorted(int(step) for step in survival.tolist()) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@family
def test_nothing_lost_nothing_changed(kind: str) -> None:
    net = small_net(kind)
    whole = plan_of({name: range(sites(net)[name].size) for name in halves_sites(net)})
    values = cross_distilled(net, whole, X, samples_per_image=9, mu=0.6, ridge=1e-3)
    assert len(values) == len(halves_sites(net))
    for name, value in values.items():
        assert torch.equal(value, net.get_parameter(name))


def halves_sites(net: nn.Module) -> list[str]:
    return [edit.site for edit in halves(net).keeps()]


@family
def test_values_fit_the_cut_network_and_bring_it_nearer(kind: str) -> None:
    net = small_net(kind)
    plan = halves(net)
    compact = cut(net, plan)
    before = copy.deepcopy(net.state_dict())
    values = cross_distilled(net, plan, X, samples_per_image=64, mu=0.6, ridge=1e-6)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    errors = [relative_error(outputs(compact, X), outputs(net, X))]
    with torch.no_grad():
        for name, value in values.items():
            parameter = compact.get_parameter(name)
            assert parameter.shape == value.shape
            parameter.copy_(value)
    errors.append(relative_error(outputs(compact, X), outputs(net, X)))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", ["vit", "resnet", "mobilenet"])
def test_each_layer_sees_what_the_pruned_network_before_it_makes(kind: str) -> None:
    """The last solution is the minimum for inputs of the network with the values before it."""
    net = small_net(kind)
    plan = halves(net)
    values = cross_distilled(net, plan, X, samples_per_image=10**6, mu=0.6, ridge=1e-3)
    last: Keep = [*plan.keeps()][-1]
    at = consumer_of(structure(net), last.site).name
    first = plan_of({edit.site: edit.index for edit in [*plan.keeps()][:-1]})
    pruned = cut(net, first)  # all but the last
    with torch.no_grad():
        for name, value in values.items():
            if name != f"{at}.weight":
                pruned.get_parameter(name).copy_(value)
    of_both = [grams(x, [at], X, 10**6)[at] for x in (net, pruned)]
    expected = _minimum(
        net.get_parameter(f"{at}.weight"),
        0.6 * of_both[0] + 0.4 * of_both[1],
        torch.tensor(last.index),
        1e-3,
    )
    assert relative_error(values[f"{at}.weight"], expected) <= 1e-9


@family
def test_a_plan_meets_its_budget_with_and_without_images(kind: str) -> None:
    net = small_net(kind)
    cost = Cost(net, 32)
    for known in (evidence(), Evidence()):
        edits = cd().plan(net, known, cost, target_of(cd())).edits
        assert {edit.site for edit in edits} == set(halves_sites(net))
        plan = Plan(model={}, edits=edits)
        units = cost.plan(plan, halves_sites(net)).units
        assert 0.65 < units / cost.total("units", halves_sites(net)) <= 0.7
    assert cd().compensation_of(net, net, plan, Evidence()) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": []}, "method.sites=.*mlp, channels"),
        ({"mu": 1.5}, "method.mu=1.5: expected a number from 0 to 1"),
        ({"step_margin": 0.9}, "method.step_margin=0.9: expected a number from 1 on"),
        ({"steps": 0, "ridge": 0.0}, "method.steps=0.*method.ridge=0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cd(**changes)
