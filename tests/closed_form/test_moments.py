"""Streaming moments against those of all rows at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitrim.closed_form.moments import Moments, MomentsError


def rows(n: int, channels: int, *, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    mixed = torch.randn(n, channels, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(channels, channels, generator=generator).double() + offset


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), offset=st.sampled_from([0, 3e2]))
def test_batches_give_the_moments_of_all_rows(sizes: list[int], offset: float) -> None:
    x = rows(sum(sizes), 4, offset=offset)
    weight = torch.linspace(0.5, 2.0, len(x)).double()
    moments = Moments("fc2", 4)
    for part, its_weight in zip(x.split(sizes), weight.split(sizes), strict=True):
        moments.add(part, its_weight)
    moments.finish()
    mean = (weight[:, None] * x).sum(0) / weight.sum()
    centred = x.float().double() - mean
    cov = (weight[:, None] * centred).T @ centred / weight.sum()
    assert torch.allclose(moments.mean, mean, rtol=1e-6, atol=1e-5)
    assert torch.allclose(moments.cov.double(), cov, rtol=1e-4, atol=1e-4)
    assert float(moments.weight) == pytest.approx(float(weight.sum()))


def test_what_is_far_from_zero_loses_no_digits() -> None:
    x = rows(4000, 3) + 1e4
    moments = Moments("fc2", 3)
    for part in x.split(100):
        moments.add(part, torch.ones(len(part)))
    moments.finish()
    expected = torch.cov(x.float().double().T, correction=0)
    assert torch.allclose(moments.cov.double(), expected, rtol=1e-4)


def test_sums_within_autocast_are_exact() -> None:
    x, weight = rows(512, 40).float(), torch.linspace(0.5, 2.0, 512)
    found = {}
    for enabled in (False, True):
        moments = Moments("fc2", 40)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for part, its_weight in zip(x.split(100), weight.split(100), strict=True):
                moments.add(part, its_weight)
        moments.finish()
        found[enabled] = moments.tensors()
    for name, tensor in found[False].items():
        assert torch.equal(found[True][name], tensor), name
    mean = (weight[:, None].double() * x.double()).sum(0) / weight.double().sum()
    centred = weight[:, None].double().sqrt() * (x.double() - mean)
    cov = centred.T @ centred / weight.double().sum()
    assert (found[True]["cov"].double() - cov).abs().max() <= 1e-6 * cov.abs().max()


def test_groups_have_moments_of_their_own() -> None:
    x = torch.stack([rows(6, 2), rows(6, 2, offset=1.0)])
    moments = Moments("qk", 2, (2,))
    moments.add(x, torch.ones(6))
    moments.finish()
    for group in range(2):
        assert torch.allclose(
            moments.cov[group].double(), torch.cov(x[group].T, correction=0), atol=1e-5
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_numbers_that_are_not_finite_are_an_error_that_names_the_layer(bad: float) -> None:
    x = rows(4, 3)
    x[2, 1] = bad
    with pytest.raises(MomentsError, match=r"blocks\.0\.mlp\.fc2"):
        Moments("blocks.0.mlp.fc2", 3).add(x, torch.ones(4))


def test_no_images_are_an_error_that_names_the_layer() -> None:
    with pytest.raises(MomentsError, match=r"fc2.*images"):
        Moments("fc2", 3).finish()


@pytest.mark.parametrize("x", [torch.ones(5, 3), torch.zeros(1, 3)], ids=["constant", "one row"])
def test_what_never_varies_has_no_variance(x: torch.Tensor) -> None:
    moments = Moments("fc2", 3)
    moments.add(x, torch.ones(len(x)))
    moments.finish()
    assert torch.equal(moments.cov, torch.zeros(3, 3))
    assert torch.equal(moments.mean, x[0].double())


def test_wide_rows_are_multiplied_in_blocks_and_mirrored() -> None:
    x = torch.randn(30, 1700, generator=torch.Generator().manual_seed(0))
    moments = Moments("layer", 1700)
    for chunk in x.split(11):
        moments.add(chunk, torch.ones(len(chunk)))
    moments.finish()
    assert torch.allclose(moments.cov, torch.cov(x.double().T, correction=0).float(), atol=1e-5)
    assert torch.equal(moments.cov, moments.cov.T)


def test_few_rows_wait_and_are_multiplied_together() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(40, 64, generator=generator), torch.rand(40, generator=generator)
    waiting, at_once = Moments("x", 64), Moments("x", 64)
    sizes = [20, 3, 3, 12, 2]
    for part, weight in zip(rows.split(sizes), weights.split(sizes), strict=True):
        waiting.add(part, weight, wait=True)
    for n in ([20], [3, 3], [12], [2]):  # eight rows of 64 channels may wait
        total = sum(n)
        at_once.add(rows[:total], weights[:total])
        rows, weights = rows[total:], weights[total:]
    waiting.finish()
    at_once.finish()
    assert torch.equal(waiting.cov, at_once.cov)
    torch.testing.assert_close(waiting.mean, at_once.mean, rtol=1e-6, atol=1e-8)


def test_what_waits_is_in_the_sums() -> None:
    rows = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    moments, expected = Moments("x", 64), Moments("x", 64)
    for each, wait in ((moments, True), (expected, False)):
        for part in rows.split(4):
            each.add(part, torch.ones(4), wait=wait)
    for sums, others in zip(moments.sums(), expected.sums(), strict=True):
        torch.testing.assert_close(sums, others, rtol=1e-5, atol=1e-5)
