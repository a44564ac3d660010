"""Every network of timm by name: it is cut, or refused with a message."""

from __future__ import annotations

import pytest
import timm

from matrix import outcome_of

NAMES = timm.list_models()
FAMILIES = {"vision_transformer", "swin_transformer", "resnet", "efficientnet"}


def module_of(name: str) -> str:
    return str(timm.model_entrypoint(name).__module__).rpartition(".")[2]


def sampled() -> list[str]:
    """Return every sixtieth name of the families, and the last of other modules: a tiny one."""
    mine = [name for name in NAMES if module_of(name) in FAMILIES]
    others = {module_of(name): name for name in NAMES if module_of(name) not in FAMILIES}
    return [*mine[::60], *others.values()]


@pytest.mark.parametrize("name", sampled())
def test_a_name_is_cut_to_shape_or_refused(name: str) -> None:
    outcome = outcome_of(name, shapes=True)
    assert outcome.kind in ("supported", "refused"), outcome.words


def test_plain_members_of_every_family_are_accepted() -> None:
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet34"):
        assert outcome_of(name).n_branches
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
