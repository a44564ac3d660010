"""Random budgets of random methods: a few of those that `python -m tests.budgets` tries."""

from __future__ import annotations

import pytest

from budgets import OPTIONS, case

SMALL = ("vit_tiny", "swin_tiny", "swinv2", "beit", "pvt_v2", "deit_tiny", "resnet18")
NUMBERS = [
    number
    for number in range(300)
    if case(number).network.startswith(SMALL) and not case(number).network.startswith("vit_s")
]


@pytest.mark.parametrize("method", OPTIONS)
def test_budgets_are_met_to_within_one_step_or_refused(method: str) -> None:
    cases = [one for one in map(case, NUMBERS) if one.method == method][:3]
    outcomes = [one.run().partition(":")[0] for one in cases]
    assert len(outcomes) == 3
    assert {*outcomes} <= {"met", "refused"}
