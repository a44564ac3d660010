"""Recipes: learning rates for the batch that there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from conftest import fit, images, small_net
from vitrim.errors import ConfigError
from vitrim.trainer.mimic import Distill
from vitrim.trainer.recipe import Recipe

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
