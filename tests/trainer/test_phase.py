"""The protocol of a phase: what follows it is accepted, and what does not is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import LightningModule

from calibration import ALL
from nets import plan_of, small_net
from vitrim import cut
from vitrim.errors import ConfigError
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Calibrate
from vitrim.trainer.classify import Classify
from vitrim.trainer.collect import Collect
from vitrim.trainer.mimic import Distill, Mimic
from vitrim.trainer.phase import PHASE, SCORER, Phase, check_phase, check_scorer
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.refit import Refit

RECIPE = Recipe(epochs=2, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.5)
SITE = "blocks.0.mlp.hidden"


def scorer(**changes: Any) -> LightningModule:
    """Return a scorer with all members, but for `changes`: None takes a member away."""
    members = {
        "net": small_net(),
        "epochs": 1,
        "calibration_images": 8,
        "resumes_at": "never",
        "clip_norm": 0.0,
        "trains": False,
        "settings": {},
        "evidence": Evidence,
        **changes,
    }
    module = LightningModule()
    module.register_buffer("total", torch.zeros(1))
    for name, value in members.items():
        if value is not None:
            setattr(module, name, value)
    return module


def refit() -> Refit:
    net = small_net()
    small = cut(net, plan_of({SITE: range(20)}))
    return Refit(small, net, sampling=ALL, ridge=1e-6, closing_ridge=1.0)


PHASES: list[tuple[Callable[[], Phase], dict[str, Any]]] = [
    (
        lambda: Classify(small_net(), recipe=RECIPE, n_classes=7),
        {"calibration_images": None, "resumes_at": "batch", "clip_norm": 0.5, "trains": True},
    ),
    (
        lambda: Mimic(small_net(), small_net(), recipe=RECIPE),
        {"calibration_images": None, "resumes_at": "batch", "clip_norm": 0.5, "trains": True},
    ),
    (
        lambda: Distill(small_net(), small_net(), recipe=RECIPE, temperature=1.0),
        {"calibration_images": None, "resumes_at": "batch", "clip_norm": 0.5, "trains": True},
    ),
    (
        lambda: Calibrate(small_net(), sites=[SITE], sampling=ALL, taylor=False),
        {"calibration_images": 64, "resumes_at": "never", "clip_norm": 0.0, "trains": False},
    ),
    (
        lambda: Collect(small_net(), images=5),
        {"calibration_images": 5, "resumes_at": "never", "clip_norm": 0.0, "trains": False},
    ),
    (refit, {"calibration_images": 64, "resumes_at": "never", "clip_norm": 0.0, "trains": False}),
]


@pytest.mark.parametrize(("make", "expected"), PHASES)
def test_the_shared_phases_follow_the_protocol(
    make: Callable[[], Phase], expected: dict[str, Any]
) -> None:
    phase = make()
    check_phase(phase)
    assert {name: getattr(phase, name) for name in expected} == expected
    if hasattr(phase, "evidence"):
        assert check_scorer(phase) is phase


@pytest.mark.parametrize("member", SCORER)
def test_a_missing_member_is_refused_by_its_name(member: str) -> None:
    check_scorer(scorer())
    module = scorer(**{member: None})
    with pytest.raises(ConfigError, match=rf"LightningModule lacks {member}: a phase has net, .*"):
        check_scorer(module)
    if member in PHASE:
        with pytest.raises(ConfigError, match=f"lacks {member}:"):
            check_phase(module)


def test_no_images_is_a_value_and_not_a_missing_member() -> None:
    module = scorer()
    module.calibration_images = None
    check_phase(module)


def test_what_is_no_lightning_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="object: a phase is a LightningModule"):
        check_phase(object())


def test_an_unknown_resume_point_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"resumes_at='step': expected one of batch, epoch, never"
    ):
        check_phase(scorer(resumes_at="step"))


class Saving(LightningModule):
    """Has no buffers, but a checkpoint of its own."""

    net, epochs, calibration_images = small_net(), 1, 8
    resumes_at, clip_norm, trains = "batch", 0.0, False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


@pytest.mark.parametrize("point", ["batch", "epoch"])
def test_a_phase_that_resumes_without_anything_saved_is_refused(point: str) -> None:
    module = scorer(resumes_at=point)
    check_phase(module)
    del module.total
    with pytest.raises(ConfigError, match=rf"resumes_at='{point}'.* no buffers .*'never'"):
        check_phase(module)
    check_phase(scorer(resumes_at=point, trains=True))
    check_phase(Saving())


def test_a_scorer_whose_result_cannot_be_loaded_is_refused() -> None:
    module = scorer()
    del module.total
    check_phase(module)
    with pytest.raises(ConfigError, match="could not load what it found"):
        check_scorer(module)
    module.epochs = 0
    assert check_scorer(module) is module
