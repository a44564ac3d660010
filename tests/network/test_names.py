"""Every network of timm by name: it is cut, or refused with a message."""

from __future__ import annotations

from typing import Any

import pytest
import timm

from matrix import NETWORKS, outcome_of
from nets import skeleton_net
from vitrim.network import branches

NAMES = timm.list_models()
FAMILIES = {"vision_transformer", "swin_transformer", "resnet", "efficientnet"}


def module_of(name: str) -> str:
    return str(timm.model_entrypoint(name).__module__).rpartition(".")[2]


def sampled() -> list[tuple[str, dict[str, Any]]]:
    """Return some names of the families, and one of every other module, small where it can be."""
    mine = [(name, {}) for name in NAMES if module_of(name) in FAMILIES]
    others = {module_of(name): (name, {}) for name in NAMES if module_of(name) not in FAMILIES}
    small = {module_of(name): (name, args) for name, args in NETWORKS.items() if name in NAMES}
    return [*mine[::120], *(small.get(module, case) for module, case in others.items())]


def parameters() -> list[Any]:
    """Return what is sampled; five of six names without a small network are slow tests."""
    large = [case for case in sampled() if not case[1]]
    slow = [case for place, case in enumerate(large) if place % 6]
    return [
        pytest.param(*case, marks=pytest.mark.slow if case in slow else ()) for case in sampled()
    ]


@pytest.mark.parametrize(("name", "args"), parameters())
def test_a_name_is_cut_to_shape_or_refused(name: str, args: dict[str, Any]) -> None:
    outcome = outcome_of(name, args, shapes=True)
    assert outcome.kind in ("supported", "refused"), outcome.words


def test_plain_members_of_every_family_are_accepted() -> None:
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet34"):
        assert branches(skeleton_net(name))
    for name in ("mobilenetv2_100", "convnext_atto"):
        assert outcome_of(name).kind == "supported"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny_vit_5m_224", "TinyVit cannot be cut; supported network classes: Beit"),
        ("convnextv2_atto", "has no MLP that can be cut; supported MLPs"),
        ("seresnet50", "with SEModule as se at layer1.0 cannot be cut; supported"),
        ("mobilenetv1_100", "every channel is one of a block's output; supported"),
        ("vitrim_compact", "is no dense network: expected a plan"),
        ("sequential_head", "is a head on another network, without pretrained weights; supported"),
    ],
)
def test_a_refusal_says_what_is_supported(name: str, words: str) -> None:
    outcome = outcome_of(name)
    assert outcome.kind == "refused"
    assert words in outcome.words


@pytest.mark.slow
def test_every_name_is_cut_to_shape_or_refused() -> None:
    outcomes = {name: outcome_of(name, shapes=True) for name in NAMES}
    assert {name: o.words for name, o in outcomes.items() if o.kind == "FAILED"} == {}
    assert sum(outcome.kind == "supported" for outcome in outcomes.values()) > 500
