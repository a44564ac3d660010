"""Criteria against formulas by hand, and the greedy order against removal one by one."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import small_net
from vitrim.closed_form.importance import CRITERIA, WITHOUT_IMAGES, importance
from vitrim.closed_form.moments import MomentsError
from vitrim.closed_form.obs import obs_greedy
from vitrim.closed_form.query_key import query_key_spectrum
from vitrim.network import structure

RIDGE = 1e-3


def covariance(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    mixed = x @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.cov(mixed.T)


def weights(size: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(size, width, generator=generator, dtype=torch.float64)


def one_by_one(cov: Tensor, outgoing: Tensor) -> list[int]:
    """Return the order of greedy removal, every step from the definition."""
    ridged = cov + RIDGE * cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype)
    remaining, order = list(range(len(cov))), []
    target = ridged @ outgoing
    while remaining:
        inverse = torch.linalg.inv(ridged[remaining][:, remaining])
        weights = inverse @ target[remaining]
        cost = weights.square().sum(1) / inverse.diagonal()
        order.append(remaining.pop(int(cost.argmin())))
    return order


@pytest.mark.parametrize("size", [2, 7, 45, 150, 250])
def test_the_greedy_order_is_that_of_removal_one_by_one(size: int) -> None:
    cov, outgoing = covariance(size), weights(size, 5 + size // 4)
    scores = obs_greedy(cov, outgoing, ridge=RIDGE)
    assert scores.argsort().tolist() == one_by_one(cov, outgoing)
    assert bool((scores.sort().values.diff() > 0).all())


def test_units_that_will_stay_come_last_and_those_that_go_keep_their_order() -> None:
    cov, outgoing = covariance(150), weights(150, 20)
    order = obs_greedy(cov, outgoing, ridge=RIDGE).argsort().tolist()
    for n_removed in (0, 1, 60, 149, 150, 151):
        scores = obs_greedy(cov, outgoing, ridge=RIDGE, n_removed=n_removed)
        assert bool((scores.sort().values.diff() > 0).all())
        assert scores.argsort()[:n_removed].tolist() == order[:n_removed]
    assert int(obs_greedy(cov, outgoing, ridge=RIDGE, n_removed=0).argmin()) == order[0]


def test_float32_gives_up_no_more_than_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    cov, outgoing = covariance(400), weights(400, 60)
    exact = obs_greedy(cov, outgoing, ridge=RIDGE).sort().values
    monkeypatch.setattr("vitrim.closed_form.obs._EXACT", 0)
    scores = obs_greedy(cov.float(), outgoing.float(), ridge=RIDGE).sort().values
    assert torch.allclose(scores[:200].sum(), exact[:200].sum(), rtol=1e-4)


def test_moments_and_weights_stay_as_they_are() -> None:
    cov, outgoing = covariance(45), weights(45, 8)
    before = cov.clone(), outgoing.clone()
    obs_greedy(cov, outgoing, ridge=RIDGE)
    assert torch.equal(cov, before[0])
    assert torch.equal(outgoing, before[1])


def test_of_two_equal_units_one_goes_first_and_the_other_stays_long() -> None:
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    doubled = torch.cat([x, x[:, :3]], dim=1)
    scores = obs_greedy(torch.cov(doubled.T), weights(9, 4), ridge=1e-6)
    first = scores.argsort()[:3].tolist()
    assert sorted(unit % 6 for unit in first) == [0, 1, 2]


def test_of_units_that_nothing_tells_apart_the_higher_index_goes_first() -> None:
    scores = obs_greedy(torch.eye(5, dtype=torch.float64), torch.ones(5, 2).double(), ridge=RIDGE)
    assert scores.argsort().tolist() == [4, 3, 2, 1, 0]


@given(order=st.permutations(range(12)))
def test_units_in_another_order_go_in_that_order(order: list[int]) -> None:
    cov, outgoing = covariance(12), weights(12, 3)
    scores = obs_greedy(cov[order][:, order], outgoing[order], ridge=RIDGE)
    assert torch.allclose(scores, obs_greedy(cov, outgoing, ridge=RIDGE)[order], rtol=1e-6)


@pytest.mark.parametrize(
    "cov",
    [torch.zeros(6, 6), torch.ones(6, 6), torch.diag(torch.tensor([0.0, 0, 0, 1, 1, 1]))],
    ids=["constant", "all equal", "half constant"],
)
def test_degenerate_moments_give_finite_scores(cov: Tensor) -> None:
    assert bool(torch.isfinite(obs_greedy(cov.double(), weights(6, 3), ridge=RIDGE)).all())


def test_the_spectrum_is_what_the_nearest_smaller_product_loses() -> None:
    q, k = covariance(6, 1), covariance(6, 2)
    (a, b), lost = query_key_spectrum(q, k)
    generator = torch.Generator().manual_seed(3)
    samples = [
        torch.randn(20000, 6, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(m).T
        for m in (q, k)
    ]
    for rank in (2, 6):
        kept = samples[0] @ a[:, :rank] * (samples[1] @ b[:, :rank])
        error = ((samples[0] * samples[1]).sum(1) - kept.sum(1)).square().mean()
        expected = lost[rank:].square().sum()
        assert torch.allclose(error, expected, rtol=0.1, atol=1e-12)


def moments_of(net: nn.Module) -> Mapping[str, Mapping[str, Tensor]]:
    moments: dict[str, dict[str, Tensor]] = {}
    for index in range(2):
        for layer in ("attn.proj", "mlp.fc2"):
            width = net.get_submodule(f"blocks.{index}.{layer}").in_features
            moments[f"blocks.{index}.{layer}"] = {
                "cov": covariance(width, index),
                "mean": torch.ones(width),
                "taylor": torch.rand(width, generator=torch.Generator().manual_seed(index)),
            }
        per_head = torch.stack([covariance(8, head) for head in range(3)])
        moments[f"blocks.{index}.attn.qk"] = {
            "q.cov": per_head,
            "k.cov": per_head.flip(0),
            "q.mean": torch.ones(3, 8),
            "k.mean": torch.ones(3, 8),
            "taylor": torch.rand(24, generator=torch.Generator().manual_seed(index)),
        }
    return moments


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["mlp.hidden", "attn.heads", "attn.qk", "attn.v"])
def test_every_criterion_scores_every_site(criterion: str, kind: str) -> None:
    net = small_net()
    described = structure(net)
    site = described.sites[f"blocks.1.{kind}"]
    scores = importance(
        net, described, moments_of(net), site, criterion=criterion, ridge=RIDGE, seed=0
    )
    assert scores.shape == (site.size,)
    assert scores.dtype == torch.float64
    assert bool(torch.isfinite(scores).all())
    assert bool((scores >= 0).all())
    assert scores.unique().numel() == site.size


def test_simple_criteria_are_their_formulas() -> None:
    net = small_net()
    described, moments = structure(net), moments_of(net)
    site = described.sites["blocks.0.mlp.hidden"]
    fc1, fc2 = net.blocks[0].mlp.fc1.weight, net.blocks[0].mlp.fc2.weight
    variance = moments["blocks.0.mlp.fc2"]["cov"].diagonal()
    expected = {
        "magnitude": fc1.abs().sum(1),
        "group_l2": (fc1.square().sum(1) + fc2.square().sum(0)).sqrt(),
        "variance": variance,
        "output_energy": variance * fc2.square().sum(0),
        "taylor": moments["blocks.0.mlp.fc2"]["taylor"],
    }
    for criterion, formula in expected.items():
        scores = importance(net, described, moments, site, criterion=criterion, ridge=RIDGE, seed=0)
        assert torch.allclose(scores, formula.detach().double())


def test_one_round_of_obs_is_the_cost_of_removing_each_unit_alone() -> None:
    net = small_net()
    described, moments = structure(net), moments_of(net)
    site = described.sites["blocks.0.mlp.hidden"]
    scores = importance(net, described, moments, site, criterion="obs", ridge=RIDGE, seed=0)
    cov = moments["blocks.0.mlp.fc2"]["cov"]
    outgoing = net.blocks[0].mlp.fc2.weight.detach().T
    assert int(scores.argmin()) == one_by_one(cov, outgoing)[0]


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c not in WITHOUT_IMAGES])
def test_criteria_that_look_at_images_say_when_there_were_none(criterion: str) -> None:
    net = small_net()
    described = structure(net)
    with pytest.raises(MomentsError, match=r"blocks\.0\.mlp\.fc2.*images"):
        importance(
            net,
            described,
            {},
            described.sites["blocks.0.mlp.hidden"],
            criterion=criterion,
            ridge=RIDGE,
            seed=0,
        )
