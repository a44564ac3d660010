"""Losses of units in a given order: against their definition, and of every compensation."""

import pytest
import torch

from vitrim.sensitivity.losses import effects_of, plain_losses_in_order, unit_losses_in_order
from vitrim.sensitivity.ordered import order_of


def positive(n: int) -> torch.Tensor:
    half = torch.randn(n, 2 * n, dtype=torch.float64)
    return half @ half.mT


def test_losses_in_order_sum_to_those_of_the_removed_units() -> None:
    n, ridge = 7, 1e-3
    cov, effects, order = positive(n), torch.randn(n, 3, dtype=torch.float64), torch.randperm(n)
    compensated = unit_losses_in_order(effects, cov, order, ridge)
    plain = plain_losses_in_order(cov * (effects @ effects.mT), order)
    ridged = cov + ridge * cov.diagonal().mean() * torch.eye(n)
    for count in range(1, n + 1):
        gone = order[:count]
        within = torch.linalg.inv(ridged)[gone][:, gone]
        expected = torch.trace(effects[gone].mT @ torch.linalg.inv(within) @ effects[gone])
        assert float(compensated[gone].sum()) == pytest.approx(float(expected))
        lost = effects[gone].mT @ cov[gone][:, gone] @ effects[gone]
        assert float(plain[gone].sum()) == pytest.approx(float(torch.trace(lost)))


def test_effects_are_the_same_from_either_form_of_the_products() -> None:
    weight, products = torch.randn(4, 3, dtype=torch.float64), positive(4)
    squares = products.diagonal()
    outer, inner = (
        effects_of(weight, given, squares, 0.3)
        for given in (products, weight.mT @ products @ weight)
    )
    assert torch.allclose(outer @ outer.mT, inner @ inner.mT)


def test_of_equal_units_the_last_goes_first() -> None:
    assert order_of(torch.tensor([2.0, 1.0, 1.0, 0.0])).tolist() == [3, 2, 1, 0]
