"""Predicted losses, scaled to what was measured."""

import pytest
import torch

from vitrim.sensitivity.predict import rising, scaled


def test_scaled_losses_sum_to_what_was_measured() -> None:
    losses = torch.tensor([4.0, 1.0, 2.0, 3.0])
    found = scaled(losses, [(0.5, 2.0), (1.0, 2.0)])
    assert torch.allclose(found, 2 * losses.double(), atol=1e-9)
    hull = rising(torch.tensor([1.0, 3.0, 1.0, 5.0]))
    assert hull.diff().min() > 0
    assert float(hull.sum()) == pytest.approx(10.0)
