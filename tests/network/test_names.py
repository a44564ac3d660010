"""Every network of timm by name: it is cut, or refused with a message."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vitrim import Drop, Keep, Plan, count, cut
from vitrim.budget.cost import Cost
from vitrim.measure import image_shape
from vitrim.network import UnsupportedArchitecture, structure
from vitrim.network.structure import blocks_of

NAMES = timm.list_models()
FAMILIES = {"vision_transformer", "swin_transformer", "resnet", "efficientnet"}


def module_of(name: str) -> str:
    return str(timm.model_entrypoint(name).__module__).rpartition(".")[2]


def sampled() -> list[str]:
    """Return every sixtieth name of the families, and the last of other modules: a tiny one."""
    mine = [name for name in NAMES if module_of(name) in FAMILIES]
    others = {module_of(name): name for name in NAMES if module_of(name) not in FAMILIES}
    return [*mine[::60], *others.values()]


def skeleton(name: str) -> nn.Module:
    with torch.device("meta"):
        try:
            return timm.create_model(name, pretrained=False)
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            pytest.skip(f"timm cannot build {name} on the meta device: {error}")


def halved(net: nn.Module) -> Plan:
    """Return a plan that halves every site except in the last block, which it drops."""
    described = structure(net)
    last = [*blocks_of(described).values()][-1] if described.branches else []
    inside = {
        part.site
        for layer in described.layers
        if layer.branch in last
        for part in (*layer.out, *layer.inp)
    }
    heads = {attention.heads for attention in described.attentions}
    keeps = [
        Keep(site=site.name, index=tuple(range(0, site.size, 2)))
        for site in described.sites.values()
        if site.size > 1 and not site.locked_reason and site.name not in inside | heads
    ]
    return Plan(model={}, edits=(*(Drop(branch=name) for name in last), *keeps))


def check(name: str) -> bool:
    """Return whether a network can be cut; if so, check the shape and size of the result."""
    net = skeleton(name)
    try:
        structure(net)
    except UnsupportedArchitecture as error:
        if "supported" not in str(error):
            raise
        return False
    config = timm.get_pretrained_cfg(name)
    size = (3, 224, 224) if config is None else config.input_size
    plan = halved(net)
    compact = cut(net, plan)
    image = torch.empty(2, *image_shape(net, size), device="meta")
    with torch.no_grad():
        assert compact.eval()(image).shape == net.eval()(image).shape
    assert Cost(net, size).plan(plan)[:2] == count(compact, size)[:2]
    return True


@pytest.mark.parametrize("name", sampled())
def test_a_name_is_cut_to_shape_or_refused(name: str) -> None:
    check(name)


def test_plain_members_of_every_family_are_accepted() -> None:
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet34"):
        assert check(name)
    for name in ("mobilenetv2_100", "convnext_atto"):
        assert check(name)
    for name in ("tiny_vit_5m_224", "convnextv2_atto", "gmlp_s16_224", "seresnet50"):
        assert not check(name)


@pytest.mark.slow
def test_every_name_is_cut_to_shape_or_refused() -> None:
    accepted = 0
    for name in NAMES:
        try:
            accepted += check(name)
        except pytest.skip.Exception:
            continue
    assert accepted > 250
