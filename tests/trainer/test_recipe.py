"""Recipes: learning rates for the batch that there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nets import fit, images, small_net
from vitrim.errors import ConfigError
from vitrim.trainer.mimic import Distill
from vitrim.trainer.recipe import Recipe, optimizer_and_schedule

NUMBERS: dict[str, Any] = {
    "epochs": 1,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "warmup_epochs": 0,
    "clip_norm": 0.0,
}


@pytest.mark.parametrize(("reference", "lr"), [(None, 1e-3), (4, 1e-3), (16, 2.5e-4), (2, 2e-3)])
def test_the_rate_is_scaled_to_the_images_of_a_step(reference: int | None, lr: float) -> None:
    recipe = Recipe(**NUMBERS, reference_batch=reference)
    net = small_net(dtype=torch.float32)
    phase = Distill(net, net, recipe=recipe, temperature=1.0)
    data = TensorDataset(images(dtype=torch.float32, batch=8), torch.arange(8) % 7)
    fit(phase, DataLoader(data, batch_size=4))
    assert {group["initial_lr"] for group in phase.optimizers().param_groups} == {lr}


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "many"])
def test_other_reference_batches_are_refused(batch: Any) -> None:
    with pytest.raises(ConfigError, match=f"reference_batch={batch}: expected null or"):
        Recipe(**NUMBERS, reference_batch=batch)


def test_a_reference_batch_that_is_not_set_identifies_nothing() -> None:
    assert Recipe(**NUMBERS).settings() == NUMBERS
    assert Recipe(**NUMBERS, reference_batch=8).settings() == {**NUMBERS, "reference_batch": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adams"}, "optimizer=adams: expected a name of timm"),
        ({"scheduler": "plateau"}, "scheduler=plateau: expected one of cosine"),
        ({"momentum": 0.9}, "momentum=0.9: expected null"),
        ({"optimizer": "sgd", "momentum": 1}, "momentum=1: expected from 0"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"min_lr": 1e-2}, "min_lr=0.01: expected at most lr"),
        ({"min_lr": 1e-4, "scheduler": "constant"}, "min_lr=0.0001: expected 0"),
        ({"warmup_lr": 1e-6}, "warmup_lr=1e-06: expected null without warm-up"),
        ({"scheduler": "step"}, "decay_epochs=null: expected above 0"),
        ({"decay_rate": 0.1}, "decay_rate=0.1: expected above 0 with scheduler=step only"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"repeats": 0}, "repeats=0"),
    ],
)
def test_what_would_be_ignored_or_cannot_work_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**{**NUMBERS, **changes})


def rates(steps: int, **changes: Any) -> list[float]:
    """Return the learning rate of every step, of 10 epochs."""
    recipe = Recipe(**{**NUMBERS, "epochs": 10, **changes})
    optimizer, schedule = optimizer_and_schedule(torch.nn.Linear(2, 2), recipe, steps=steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_rates_begin_and_end_as_the_recipe_says() -> None:
    found = rates(101, warmup_epochs=2, warmup_lr=1e-6, min_lr=1e-5)
    assert found[0] == pytest.approx(1e-6)
    assert max(found) == pytest.approx(1e-3, rel=1e-2)
    assert found[-1] == pytest.approx(1e-5, rel=0.1)
    assert rates(10, scheduler="constant") == [1e-3] * 10
    stepped = rates(10, scheduler="step", decay_epochs=4, decay_rate=0.1, optimizer="sgd")
    assert stepped == pytest.approx([1e-3] * 4 + [1e-4] * 4 + [1e-5] * 2)
    for name in ("poly", "tanh"):
        found = rates(10, scheduler=name)
        assert found[0] == pytest.approx(1e-3)
        assert found == sorted(found, reverse=True)
        assert found[-1] < 2e-4


def test_rates_decay_from_the_last_layer_to_the_first() -> None:
    net = small_net(dtype=torch.float32)
    recipe = Recipe(**{**NUMBERS, "layer_decay": 0.5})
    optimizer, _ = optimizer_and_schedule(net, recipe, steps=2)
    found = {
        id(parameter): group["initial_lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == len([*net.parameters()])
    names = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight")
    first, block, head = (found[id(net.get_parameter(name))] for name in names)
    assert first < block < head == 1e-3


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion"])
def test_optimisers_of_timm_train(name: str) -> None:
    net = torch.nn.Linear(2, 1)
    before = net.weight.clone()
    recipe = Recipe(**{**NUMBERS, "optimizer": name})
    optimizer, _ = optimizer_and_schedule(net, recipe, steps=2)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, net.weight)
