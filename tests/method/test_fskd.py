from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nets import TINY, images, outputs, plan_of, randomise, relative_error
from targets import target_of
from vitrim import Plan, cut
from vitrim.budget.cost import Cost
from vitrim.budget.target import TargetError
from vitrim.errors import ConfigError
from vitrim.method.fskd import FSKD, _map, aligned_weights
from vitrim.network import sites, structure
from vitrim.network.structure import of_kind
from vitrim.plan import Evidence

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "resnet": ("resnet18", {"layers": [1, 2, 1, 1], "channels": [8, 8, 8, 8], "num_classes": 7}),
    "mobilenet": ("mobilenetv2_035", {"depth_multiplier": 0.3, "num_classes": 7}),
}
family = pytest.mark.parametrize("kind", MODELS)
X = images(batch=6)


def fskd(**changes: Any) -> FSKD:
    settings: dict[str, Any] = {
        "levels": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],
        "sites": ["mlp", "channels"],
        "scope": "site",
        "round_to": 1,
        "images": 6,
        "samples_per_image": 64,
        "ridge": 1e-6,
    }
    return FSKD(**{**settings, **changes})


def small_net(kind: str) -> nn.Module:
    name, args = MODELS[kind]
    return randomise(timm.create_model(name, **args).double())


def planned(kind: str, net: nn.Module) -> Plan:
    proposal = fskd().plan(net, Evidence(), Cost(net, 32), target_of(fskd()))
    return Plan(model={}, edits=proposal.edits)


def with_values(net: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in values.items():
            twin.get_parameter(name).copy_(value)
    return twin


def outputs_at(net: nn.Module, path: str) -> Tensor:
    found: list[Tensor] = []
    handle = net.get_submodule(path).register_forward_hook(lambda *a: found.append(a[2].detach()))
    outputs(net, X)
    handle.remove()
    return found[0]


def test_a_map_is_found_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    q = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 0.5], [0.3, 0.0, 2.0]], dtype=torch.float64)
    assert relative_error(_map(x, x @ q, 1e-14, diagonal=False), q) <= 1e-10
    scale = torch.diag(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))
    assert relative_error(_map(x, x @ scale, 1e-14, diagonal=True), scale) <= 1e-10
    assert torch.equal(_map(0 * x, x, 1e-3, diagonal=False), torch.eye(3, dtype=torch.float64))


@family
def test_where_nothing_is_lost_nothing_is_changed(kind: str) -> None:
    net = small_net(kind)
    whole = plan_of({name: range(site.size) for name, site in sites(net).items()})
    compact = cut(net, whole)
    values = aligned_weights(net, compact, whole, X, samples_per_image=9, ridge=1e-3)
    assert len(values) >= 4
    for name, value in values.items():
        assert relative_error(value, compact.get_parameter(name)) <= 1e-12


@family
def test_layers_come_nearer_to_the_dense_ones(kind: str) -> None:
    net = small_net(kind)
    plan = planned(kind, net)
    compact = cut(net, plan)
    before = copy.deepcopy(compact.state_dict())
    values = aligned_weights(net, compact, plan, X, samples_per_image=64, ridge=1e-6)
    assert all(torch.equal(t, before[name]) for name, t in compact.state_dict().items())
    after = with_values(compact, values)
    last = {name.rsplit(".", 1)[0] for name in values if not name.endswith("bias")}
    full = [n for n in last if net.get_submodule(n).weight.shape[0] == len(values[f"{n}.weight"])]
    assert full
    errors = {
        n: [float((outputs_at(x, n) - outputs_at(net, n)).square().sum()) for x in (compact, after)]
        for n in full
    }
    assert all(now < once for once, now in errors.values())


def test_the_absorbed_maps_are_what_the_hooks_computed() -> None:
    """What is left of the error of the last layer is orthogonal to what the layer gives."""
    net = small_net("vit")
    plan = plan_of({"blocks.0.mlp.hidden": range(0, 48, 2)})
    compact = cut(net, plan)
    after = with_values(
        compact, aligned_weights(net, compact, plan, X, samples_per_image=64, ridge=1e-12)
    )
    x, aim = outputs_at(after, "blocks.0.mlp.fc2"), outputs_at(net, "blocks.0.mlp.fc2")
    rows = x.flatten(0, 1)
    left = rows.T @ (aim - x).flatten(0, 1)
    assert relative_error(left + rows.T @ rows, rows.T @ rows) <= 1e-9
    assert relative_error(x, aim) > 1e-3


def test_the_smallest_norms_go() -> None:
    net = small_net("resnet")
    plan = planned("resnet", net)
    assert {edit.site for edit in plan.keeps()} == sites(net).keys()
    for keep in plan.keeps():
        norms = net.get_submodule(keep.site.removesuffix(".channels")).weight.abs().sum((1, 2, 3))
        assert sorted(norms.argsort(descending=True)[: len(keep.index)].tolist()) == [*keep.index]


def test_without_images_nothing_is_aligned() -> None:
    net = small_net("vit")
    plan = planned("vit", net)
    assert fskd().compensation_of(net, cut(net, plan), plan, Evidence()) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ["heads"]}, "method.sites=.*mlp, channels"),
        ({"ridge": 0.0}, "method.ridge=0.0: expected a number above 0"),
        ({"images": 0, "samples_per_image": 0}, "method.images=0.*method.samples_per_image=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fskd(**changes)


def test_a_network_without_such_units_is_refused() -> None:
    with pytest.raises(TargetError, match="this network has none of them"):
        fskd(sites=["channels"]).check(Cost(small_net("vit"), 32), target_of(fskd()))


def test_the_mlps_of_mixers_are_left_alone() -> None:
    mixer = timm.create_model("mixer_s32_224", img_size=64, num_classes=7)
    assert len(of_kind(structure(mixer), "hidden")) == 16
    with pytest.raises(TargetError, match="this network has none of them"):
        fskd().check(Cost(mixer, 64), target_of(fskd()))
