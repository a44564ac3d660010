"""Decompositions against a plain SVD of the whitened weight, and properties of every spectrum."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitrim.method.mixed_rank.metric import (
    DECOMPOSITIONS,
    Decomposition,
    input_gram,
    rank_curves,
)
from vitrim.network.decompose import decompose, output_metric

SHAPES = [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)]


def drawn(shape: tuple[int, int], seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def metric(size: int, seed: int = 1, *, rows: int = 50) -> Tensor:
    x = drawn((rows, size), seed) * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.T @ x / rows


def lost(weight: Tensor, factors: tuple[Tensor, Tensor], metric: Tensor) -> float:
    error = weight.double() - factors[0].double() @ factors[1].double()
    return float((error @ metric * error).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_every_rank_loses_what_the_whitened_svd_loses(shape: tuple[int, int], seed: int) -> None:
    weight, cov = drawn(shape, seed), metric(shape[1])
    ridged = cov + 1e-6 * cov.diagonal().mean() * torch.eye(shape[1])
    singular = torch.linalg.svdvals(weight @ torch.linalg.cholesky(ridged))
    spectrum = decompose(weight, cov)
    assert torch.allclose(spectrum.energy, singular.square(), rtol=1e-6, atol=1e-9)
    for rank in range(1, min(shape) + 1):
        best = float(singular[rank:].square().sum())
        assert lost(weight, spectrum.factors(rank), ridged) == pytest.approx(
            best, rel=1e-6, abs=1e-9
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_metric_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = drawn(shape)
    spectrum = decompose(weight, None)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    for rank in range(1, min(shape) + 1):
        up, down = spectrum.factors(rank)
        assert torch.allclose(up @ down, u[:, :rank] * s[:rank] @ v[:rank], atol=1e-10)


@given(
    st.sampled_from(SHAPES),
    st.integers(0, 5),
    st.sampled_from(["full", "few", "constant", "repeated", "zero", "huge", "tiny", "rounded"]),
)
def test_full_rank_is_the_weight_and_errors_never_grow(
    shape: tuple[int, int], seed: int, kind: str
) -> None:
    cov = metric(shape[1])
    match kind:
        case "few":
            cov = metric(shape[1], rows=2)
        case "constant":
            cov[0] = cov[:, 0] = 0.0
        case "repeated":
            cov = torch.ones_like(cov)
        case "zero":
            cov = torch.zeros_like(cov)
        case "huge":
            cov = cov * 1e30
        case "rounded":
            cov = metric(shape[1], rows=2).float().double()
            cov -= 3e-6 * torch.eye(shape[1])
        case "tiny":
            cov = cov * 1e-30
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        weight = drawn(shape, seed, dtype=dtype)
        spectrum = decompose(weight, cov)
        up, down = spectrum.factors(min(shape))
        assert bool(torch.isfinite(up).all())
        assert bool(torch.isfinite(down).all())
        assert float((up @ down - weight).abs().max()) <= bound
        ranks = range(1, min(shape) + 1)
        errors = [lost(weight, spectrum.factors(rank), cov) for rank in ranks]
        total = float((weight.double() @ cov * weight.double()).sum().abs())
        slack = (1e-2 if kind == "rounded" else 1e-6) * total + 1e-300
        assert all(after <= before + slack for before, after in pairwise(errors))


def test_factors_are_contiguous_and_balanced() -> None:
    up, down = decompose(drawn((4, 9)), metric(9)).factors(3)
    assert up.is_contiguous()
    assert down.is_contiguous()
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inputs", ["full", "identity"])
def test_with_outputs_that_matter_every_rank_loses_the_least(
    shape: tuple[int, int], inputs: str
) -> None:
    weight, g = drawn(shape), metric(shape[0], 4)
    cov = metric(shape[1]) if inputs == "full" else torch.eye(shape[1], dtype=torch.float64)
    ridged = cov + 1e-6 * cov.diagonal().mean() * torch.eye(shape[1])
    known = g if shape[0] <= shape[1] else weight.T @ g @ weight
    spectrum = decompose(weight, cov if inputs == "full" else None, outputs=known)
    root = torch.linalg.cholesky(g)
    singular = torch.linalg.svdvals(root.T @ weight @ torch.linalg.cholesky(ridged))
    assert torch.allclose(spectrum.energy, singular.square(), rtol=1e-5, atol=1e-9)
    for rank in range(1, min(shape) + 1):
        up, down = spectrum.factors(rank)
        error = root.T @ (weight - up @ down)
        best = float(singular[rank:].square().sum())
        assert float((error @ ridged * error).sum()) == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert torch.allclose(up @ down, weight, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_few_derivatives_full_rank_is_still_the_weight(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, g = drawn(shape, dtype=dtype), metric(shape[0], 4, rows=1) * 1e-20
    known = g if shape[0] <= shape[1] else weight.T.double() @ g @ weight.double()
    for shrinkage in (0.0, 0.3):
        mattered = output_metric(weight, known, g.diagonal(), shrinkage)
        up, down = decompose(weight, metric(shape[1]), outputs=mattered).factors(min(shape))
        assert float((up @ down - weight).abs().max()) <= (1e-3 if dtype.itemsize == 4 else 1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (12, 8)])
def test_outputs_that_count_more_are_nearer(shape: tuple[int, int]) -> None:
    weight, cov = drawn(shape), metric(8)
    slope = torch.ones(shape[0], dtype=torch.float64)

    def factors(slope: Tensor) -> Tensor:
        known = output_metric(weight, torch.zeros(8, 8), slope, 1.0)
        up, down = decompose(weight, cov, outputs=known).factors(3)
        return up @ down

    plain = factors(slope)
    assert torch.allclose(plain, torch.mm(*decompose(weight, cov).factors(3)))
    slope[2] = 1e4

    def error(product: Tensor) -> float:
        return float((weight - product)[2].norm())

    assert error(factors(slope)) < 0.05 * error(plain)
    assert output_metric(weight, torch.zeros(8, 8), torch.zeros(shape[0]), 0.5) is None


def test_products_of_derivatives_are_shrunk_to_their_diagonal() -> None:
    g = torch.tensor([[4.0, 1.0], [1.0, 1e-9]], dtype=torch.float64)
    weight, slope = drawn((2, 2)), g.diagonal()
    lifted = 1e-3 * float(slope.mean())
    half = output_metric(weight, g, slope, 0.5)
    assert half is not None
    expected = [4.0, 0.5, 0.5, 0.5e-9 + 0.5 * lifted]
    assert half.flatten().tolist() == pytest.approx(expected)


def test_metrics_by_hand() -> None:
    mean, cov = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    tokens = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    statistics = {"mean": mean, "cov": cov, "abs": torch.tensor([3.0, 1.0]), "tokens": tokens}
    expected: dict[Decomposition, list[list[float]] | None] = {
        "plain": None,
        "asvd": [[3.0, 0.0], [0.0, 1.0]],
        "whitening": [[3.0, 2.5], [2.5, 5.0]],
        "normalised_output": [[3.0, 2.5], [2.5, 5.0]],
        "mean_input": [[1.0, 1.0], [1.0, 2.0]],
        "centred": [[2.0, 0.5], [0.5, 1.0]],
        "loss": [[2.0, 0.5], [0.5, 1.0]],
    }
    assert expected.keys() == set(DECOMPOSITIONS)
    for name, value in expected.items():
        gram = input_gram(name, statistics)
        assert (gram is None and value is None) or (gram is not None and gram.tolist() == value)


@pytest.mark.parametrize("shape", [*SHAPES, (12, 30), (30, 12)])
@pytest.mark.parametrize("measured", ["identity", "full", "few"])
@pytest.mark.parametrize("used", ["plain", "full", "outputs"])
def test_curves_are_those_of_the_factors(shape: tuple[int, int], measured: str, used: str) -> None:
    weight = drawn(shape)
    cov = None if measured == "identity" else metric(shape[1], rows=2 if measured == "few" else 50)
    outputs = metric(min(shape), 3) if used == "outputs" else None
    spectrum = decompose(weight, None if used == "plain" else metric(shape[1], 4), outputs=outputs)
    curves = rank_curves(weight, spectrum, cov)
    against = torch.eye(shape[1], dtype=torch.float64) if cov is None else cov
    total = float((weight @ against * weight).sum())
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert curves["rank"] == list(range(1, min(shape) + 1))
    for i, rank in enumerate(range(1, min(shape) + 1)):
        energy = float(s[:rank].square().sum() / s.square().sum())
        assert curves["energy"][i] == pytest.approx(energy, rel=1e-9)
        plain = u[:, :rank] * s[:rank], v[:rank]
        for name, factors in (("error", spectrum.factors(rank)), ("plain_error", plain)):
            expected = (max(0.0, lost(weight, factors, against)) / total) ** 0.5
            assert curves[name][i] == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_ranks_of_curves() -> None:
    weight = drawn((192, 200), dtype=torch.float32)
    curves = rank_curves(weight, decompose(weight, None), None)
    ranks = curves["rank"]
    assert {type(rank) for rank in ranks} == {int}
    assert (ranks[0], ranks[-1]) == (1, 192)
    assert 18 <= len(ranks) <= 24
    assert all(after > before for before, after in pairwise(ranks))
    assert all(after / before <= 2 for before, after in pairwise(ranks))
    assert curves["error"] == pytest.approx(curves["plain_error"], abs=1e-3)
    assert curves["energy"][-1] == 1.0
    assert curves["error"][-1] == curves["plain_error"][-1] == 0.0
    few = rank_curves(weight, decompose(weight, None), None, points=3)
    assert few["rank"] == [1, 14, 192]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("empty", ["weight", "metric"])
def test_curves_are_finite(scale: float, empty: str) -> None:
    weight, cov = drawn((4, 9)), metric(9)
    weight, cov = (weight * scale, cov) if empty == "weight" else (weight, cov * scale)
    curves = rank_curves(weight, decompose(weight, cov), cov)
    for name in ("energy", "error", "plain_error"):
        assert all(0.0 <= value <= 1.0 + 1e-9 for value in curves[name])
    if scale == 0.0:
        assert curves["error"] == [0.0] * 4
    if scale == 0.0 and empty == "weight":
        assert curves["energy"] == [1.0] * 4
