"""Trimming: the largest plan within a target, and what it never does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nets import MODEL, SIZE, heads_of, plan_of, skeleton_net, small_net
from vitrim import Keep, Plan, count, cut
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.budget.trim import trim
from vitrim.network import sites
from vitrim.plan import PlanError

GATED = ("attn.input", "attn.v", "mlp.input", "mlp.hidden")
METRICS = st.sampled_from(["macs", "params", "units"])
SCOPES = st.sampled_from(["global", "site"])
SHARES = st.floats(0, 0.99)
SEEDS = st.integers(0, 99)


@cache
def net() -> nn.Module:
    return small_net(dtype=torch.float32)


@cache
def cost() -> Cost:
    return Cost(net(), SIZE)


def random_scores(seed: int, kinds: tuple[str, ...] = GATED) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(site.size, generator=generator)
        for name, site in sites(net()).items()
        if name.split(".", 2)[2] in kinds
    }


def plan(edits: tuple[Keep, ...]) -> Plan:
    return Plan(model=MODEL, edits=edits)


def left(edits: tuple[Keep, ...], metric: Any, scored: list[str]) -> int:
    return cost().plan(plan(edits), scored).of(metric)


def least(metric: Any, scores: dict[str, Tensor], round_to: int = 1) -> int:
    """Return what remains when every scored site is left with one step of its first head."""
    first = {name: heads_of(sites(net())[name])[0][:round_to] for name in scores}
    return left(plan_of(first).edits, metric, list(scores))


def budget(metric: Any, share: float, scores: dict[str, Tensor], round_to: int = 1) -> Target:
    """Return the target that lies at `share` of the way from the least to everything."""
    dense, floor = left((), metric, list(scores)), least(metric, scores, round_to)
    return Target(metric=metric, keep=round(floor + share * (dense - floor)))


def kept_at(edits: tuple[Keep, ...], name: str) -> list[int]:
    by_site = {keep.site: list(keep.index) for keep in edits}
    return by_site.get(name, list(range(sites(net())[name].size)))


def asked(edits: tuple[Keep, ...], scores: Mapping[str, Tensor]) -> tuple[Keep, ...]:
    """Return the edits at scored sites: any others only spell out what follows from these."""
    found = tuple(edit for edit in edits if edit.site in scores)
    assert cost().plan(plan(found)) == cost().plan(plan(edits))
    return found


def last_step(edits: tuple[Keep, ...], scores: dict[str, Tensor], round_to: int) -> Keep:
    """Return the site of the last global step, as it was before: the removal of highest mean."""
    removals = []
    for name, score in scores.items():
        kept = kept_at(edits, name)
        for head in heads_of(sites(net())[name]):
            gone = sorted(set(head) - set(kept), key=lambda unit: float(score[unit]))[-round_to:]
            if gone:
                before = Keep(site=name, index=tuple(sorted([*kept, *gone])))
                removals.append((float(score[gone].double().mean()), before))
    return max(removals, key=lambda removal: removal[0])[1]


@given(seed=SEEDS, metric=METRICS, share=SHARES, round_to=st.sampled_from([1, 3, 8]))
def test_trim_stops_at_the_first_step_within_the_target(
    seed: int, metric: Any, share: float, round_to: int
) -> None:
    scores = random_scores(seed)
    target = budget(metric, share, scores, round_to=8)
    edits = trim(cost(), scores, target, round_to=round_to)
    assert left(edits, metric, list(scores)) <= target.keep
    before = last_step(edits, scores, round_to)
    others = tuple(edit for edit in asked(edits, scores) if edit.site != before.site)
    assert left((*others, before), metric, list(scores)) > target.keep


@given(seed=SEEDS, metric=METRICS, share=SHARES)
def test_trim_by_site_removes_the_same_share_of_each(seed: int, metric: Any, share: float) -> None:
    scores = random_scores(seed)
    target = budget(metric, share, scores)
    edits = trim(cost(), scores, target, scope="site")
    assert left(edits, metric, list(scores)) <= target.keep
    sizes = {name: len(score) for name, score in scores.items()}
    gone = {name: sizes[name] - len(kept_at(edits, name)) for name in scores}
    shares = {name: gone[name] / sizes[name] for name in scores}
    most = max(shares.values())
    assert all(shares[name] + 1 / sizes[name] >= most - 1e-9 for name in scores)
    for name, score in scores.items():  # in each site the lowest went
        assert kept_at(edits, name) == sorted(score.argsort().tolist()[gone[name] :])
    before = []
    for last in (name for name in scores if shares[name] >= most - 1e-9):
        back = tuple(sorted(scores[last].argsort().tolist()[gone[last] - 1 :]))
        others = tuple(edit for edit in asked(edits, scores) if edit.site != last)
        before.append(left((*others, Keep(site=last, index=back)), metric, list(scores)))
    assert max(before) > target.keep


@given(seed=SEEDS, scope=SCOPES, shares=st.lists(SHARES, max_size=4))
def test_a_smaller_target_keeps_a_part_of_what_a_larger_one_keeps(
    seed: int, scope: Any, shares: list[float]
) -> None:
    """In units, which all count the same; of MACs and params, others may be kept in the rest."""
    scores = random_scores(seed)
    found = [
        trim(cost(), scores, budget("units", share, scores), scope=scope)
        for share in sorted(shares)
    ]
    for less, more in pairwise(found):
        assert all(set(kept_at(less, name)) <= set(kept_at(more, name)) for name in scores)


@given(seed=SEEDS, metric=METRICS, shares=st.lists(SHARES, min_size=2, max_size=3))
def test_a_smaller_target_keeps_little_that_a_larger_one_does_not(
    seed: int, metric: Any, shares: list[float]
) -> None:
    scores = random_scores(seed)
    found = [trim(cost(), scores, budget(metric, share, scores)) for share in sorted(shares)]
    without_a_head = plan_of({"blocks.0.attn.v": range(8, 24)}).edits
    head = left((), metric, list(scores)) - left(without_a_head, metric, list(scores))
    for less, more in pairwise(found):
        both = {name: sorted({*kept_at(less, name)} & {*kept_at(more, name)}) for name in scores}
        rest = left(less, metric, list(scores)) - left(plan_of(both).edits, metric, list(scores))
        assert rest <= head


@given(seed=SEEDS, scope=SCOPES, keep=st.floats(0.4, 1.0))
def test_kept_widths_are_multiples_of_round_to_in_every_head(
    seed: int, scope: Any, keep: float
) -> None:
    scores = random_scores(seed)
    edits = trim(cost(), scores, Target(metric="units", keep=keep), scope=scope, round_to=8)
    for edit in asked(edits, scores):
        for head in heads_of(sites(net())[edit.site]):
            assert len(set(head) & set(edit.index)) % 8 == 0


def test_heads_that_round_to_does_not_divide_lose_the_rest_first() -> None:
    wide = small_net(embed_dim=36)  # 3 heads of 12
    scores = {"blocks.0.attn.v": torch.rand(36, generator=torch.Generator().manual_seed(0))}
    seen = set()
    for keep in range(8, 36):
        edits = trim(Cost(wide, SIZE), scores, Target(metric="units", keep=keep), round_to=8)
        (kept,) = (edit.index for edit in edits if edit.site in scores)
        seen |= {sum(unit // 12 == head for unit in kept) for head in range(3)}
    assert seen == {0, 8, 12}


def test_a_head_narrower_than_round_to_goes_as_a_whole() -> None:
    scores = {"blocks.0.attn.v": torch.arange(24.0)}
    for keep, index in ((23, range(8, 24)), (15, range(16, 24))):
        target = Target(metric="units", keep=keep)
        edits = asked(trim(cost(), scores, target, round_to=16), scores)
        assert edits == (Keep(site="blocks.0.attn.v", index=tuple(index)),)


@given(scope=SCOPES, keep=st.integers(64, 240), round_to=st.sampled_from([1, 3, 8]))
def test_equal_scores_keep_the_low_indices(scope: Any, keep: int, round_to: int) -> None:
    scores = {name: torch.ones_like(score) for name, score in random_scores(0).items()}
    target = Target(metric="units", keep=keep)
    edits = trim(cost(), scores, target, scope=scope, round_to=round_to)
    kept = [kept_at(edits, name) for name in scores]
    assert kept == [list(range(len(index))) for index in kept]
    assert 0 <= keep - sum(map(len, kept)) < round_to


@pytest.mark.parametrize("value", [1.0, 0.5, 0.7, 0.35, -0.7])
@pytest.mark.parametrize("scope", ["global", "site"])
def test_equal_scores_lose_the_rest_of_a_head_first(scope: Any, value: float) -> None:
    """The mean of three times 0.7 is a bit less than 0.7: no order may hang on that."""
    scores = {"blocks.0.attn.v": torch.full((24,), value, dtype=torch.float64)}
    for keep in range(3, 24):
        target = Target(metric="units", keep=keep)
        kept = kept_at(trim(cost(), scores, target, scope=scope, round_to=3), "blocks.0.attn.v")
        assert kept == list(range(len(kept)))


@given(seed=SEEDS, scope=SCOPES, metric=METRICS, share=SHARES, round_to=st.sampled_from([1, 2, 8]))
def test_even_heads_lose_as_many_dims_each(
    seed: int, scope: Any, metric: Any, share: float, round_to: int
) -> None:
    scores = random_scores(seed)
    target = budget(metric, 0.2 + 0.8 * share, scores, round_to=8)
    edits = trim(cost(), scores, target, scope=scope, round_to=round_to, even_heads=True)
    assert left(edits, metric, list(scores)) <= target.keep
    for i in (0, 1):
        name = f"blocks.{i}.attn.v"
        kept = set(kept_at(edits, name))
        widths = [len(kept & set(head)) for head in heads_of(sites(net())[name])]
        assert widths == 3 * [widths[0]]
        assert widths[0] % round_to == 0 < widths[0]
        for head in heads_of(sites(net())[name]):  # in each head the lowest went
            ranked = sorted(head, key=lambda unit: float(scores[name][unit]))
            assert set(ranked[8 - widths[0] :]) == kept & set(head)


def test_even_heads_are_trimmed_by_hand() -> None:
    scores = {"blocks.0.attn.v": torch.tensor([*range(8), *range(7, -1, -1), *range(8, 16)])}
    edits = trim(cost(), scores, Target(metric="units", keep=7), even_heads=True)
    assert edits == (Keep(site="blocks.0.attn.v", index=(6, 7, 8, 9, 22, 23)),)


@given(seed=SEEDS, scope=SCOPES, metric=METRICS, share=SHARES)
def test_permuted_scores_keep_the_permuted_units(
    seed: int, scope: Any, metric: Any, share: float
) -> None:
    scores = random_scores(seed, ("attn.input", "mlp.input", "mlp.hidden"))
    generator = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(len(x), generator=generator) for name, x in scores.items()}
    permuted = {name: score[orders[name]] for name, score in scores.items()}
    target = budget(metric, share, scores)
    plain, moved = (trim(cost(), x, target, scope=scope) for x in (scores, permuted))
    for name in scores:
        kept = orders[name][kept_at(moved, name)].tolist()
        assert sorted(kept) == kept_at(plain, name)


SECOND_CUTS = {
    "unequal heads": {"blocks.0.attn.qk": (0, 8, 9), "blocks.0.attn.v": range(3, 20)},
    "the best head has no query-key dims": {"blocks.0.attn.qk": (0, 1, 9)},
    "no query-key dims at all": {"blocks.0.attn.qk": (0,), "blocks.0.attn.v": range(8, 24)},
}


@pytest.mark.parametrize("kept", SECOND_CUTS.values(), ids=SECOND_CUTS)
@pytest.mark.parametrize("kinds", [GATED, ("attn.qk", *GATED), ("attn.heads", "attn.qk", *GATED)])
def test_a_cut_network_is_trimmed_further(
    kept: dict[str, Sequence[int]], kinds: tuple[str, ...]
) -> None:
    once = cut(net(), plan_of(kept))
    again = Cost(once, SIZE)
    scores = {
        name: torch.arange(float(site.size))
        for name, site in sites(once).items()
        if name.split(".", 2)[2] in kinds
    }
    found = plan(trim(again, scores, Target(metric="macs", keep=0.7)))
    macs = count(cut(once, found), SIZE).macs
    assert 0.66 * again.dense_count.macs < macs <= 0.7 * again.dense_count.macs


@pytest.mark.parametrize("name", ["blocks.0.attn.qk", "blocks.0.mlp.hidden", "blocks.9.attn.v"])
def test_scores_of_a_site_that_cannot_be_cut_are_refused(name: str) -> None:
    locked = Cost(small_net(qk_norm=True, scale_mlp_norm=True), SIZE)
    scores = {name: torch.arange(24.0 if "attn" in name else 48.0)}
    with pytest.raises((TargetError, PlanError), match=name):
        trim(locked, scores, Target(metric="macs", keep=0.99))


def test_even_heads_of_a_network_with_unequal_heads_are_refused_by_site() -> None:
    once = cut(net(), plan_of({"blocks.0.attn.v": range(3, 24)}))
    scores = {"blocks.0.attn.v": torch.arange(21.0)}
    with pytest.raises(TargetError, match=r"blocks\.0\.attn\.v"):
        trim(Cost(once, SIZE), scores, Target(metric="macs", keep=0.98), even_heads=True)


@pytest.mark.parametrize("metric", ["macs", "params", "units"])
@pytest.mark.parametrize("scope", ["global", "site"])
@pytest.mark.parametrize("keep", [1, 1.0])
def test_keeping_everything_takes_no_edits(metric: Any, scope: Any, keep: float) -> None:
    assert trim(cost(), random_scores(0), Target(metric=metric, keep=keep), scope=scope) == ()


@pytest.mark.parametrize("metric", ["macs", "params", "units"])
def test_a_share_and_its_count_mean_the_same(metric: Any) -> None:
    scores = random_scores(0)
    dense = left((), metric, list(scores))
    share = trim(cost(), scores, Target(metric=metric, keep=0.75))
    assert share == trim(cost(), scores, Target(metric=metric, keep=int(0.75 * dense)))
    assert share == trim(cost(), scores, Target(metric=metric, keep=float(int(0.75 * dense))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused_by_site(bad: float) -> None:
    scores = random_scores(0)
    scores["blocks.1.mlp.hidden"][3] = bad
    with pytest.raises(TargetError, match=r"blocks\.1\.mlp\.hidden"):
        trim(cost(), scores, Target(metric="units", keep=0.5))


@pytest.mark.parametrize("shape", [(47,), (49,), (48, 1), ()])
def test_scores_of_another_size_are_refused_by_site(shape: tuple[int, ...]) -> None:
    scores = {"blocks.1.mlp.hidden": torch.ones(shape)}
    with pytest.raises(TargetError, match=r"blocks\.1\.mlp\.hidden.*48"):
        trim(cost(), scores, Target(metric="units", keep=0.5))


@pytest.mark.parametrize("metric", ["macs", "params", "units"])
@pytest.mark.parametrize("scope", ["global", "site"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_target_out_of_reach_names_the_least_that_is_in_reach(
    metric: Any, scope: Any, round_to: int
) -> None:
    scores = random_scores(0)
    with pytest.raises(TargetError, match=f"target.{metric}") as caught:
        trim(cost(), scores, Target(metric=metric, keep=2), scope=scope, round_to=round_to)
    numbers = [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", str(caught.value))]
    floor = least(metric, scores, round_to)
    assert floor in numbers
    target = Target(metric=metric, keep=floor)
    edits = trim(cost(), scores, target, scope=scope, round_to=round_to)
    assert left(edits, metric, list(scores)) == floor


STAGES = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4}


@cache
def swin_cost() -> Cost:
    """Return the formula of a Swin, whose units cost differently in its two stages."""
    args = {**STAGES, "img_size": 32, "patch_size": 2, "num_classes": 7}
    return Cost(skeleton_net("swin_tiny_patch4_window7_224", **args), SIZE)


def larger_by_a_step(edits: tuple[Keep, ...], scores: Mapping[str, Tensor]) -> list[int]:
    """Return the params of all plans that keep a unit more, in heads that are there."""
    found, described = [], swin_cost().structure
    kept = {name: range(described.sites[name].size) for name in scores}
    kept |= {keep.site: keep.index for keep in edits if keep.site in scores}
    for name, units in kept.items():
        for head in heads_of(described.sites[name]):
            gone = sorted({*head} - {*units})
            if gone and len(gone) < len(head):
                more = plan_of({**kept, name: sorted((*units, gone[0]))})
                found.append(swin_cost().plan(more).params)
    return found


@given(seed=SEEDS, keep=st.floats(0.5, 0.95))
def test_a_plan_ends_less_than_its_cheapest_unit_below_the_target(seed: int, keep: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(site.size, generator=generator)
        for name, site in swin_cost().structure.sites.items()
        if name.split(".")[-1] in ("v", "hidden")
    }
    target = Target(metric="params", keep=keep)
    edits = trim(swin_cost(), scores, target)
    limit = swin_cost().limit(target)
    assert swin_cost().plan(plan(edits)).params <= limit
    larger = larger_by_a_step(edits, scores)
    assert larger
    assert min(larger) > limit


def test_where_a_head_goes_dims_of_others_stay_for_it() -> None:
    """Its query-key dims go with its last value dim, and would leave room for 25 value dims."""
    score = torch.arange(24.0)
    score[:8] = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 7.5])
    scores = {"blocks.0.attn.v": score}
    dense = cost().dense_count.params
    edits = trim(cost(), scores, Target(metric="params", keep=dense - 7 * 49 - 25))
    reached = left(edits, "params", [*scores])
    assert dense - 7 * 49 - 25 - 49 < reached <= dense - 7 * 49 - 25


HEAD_WARS = {
    "blocks.0.attn.qk": torch.arange(24.0),  # the last head is the best to query with
    "blocks.0.attn.v": torch.arange(24.0).flip(0),  # the first one has the best values
}


@given(metric=METRICS, share=st.floats(0.05, 0.99))
def test_the_target_is_met_where_query_keys_and_values_prefer_other_heads(
    metric: Any, share: float
) -> None:
    """All query-key dims of the only head left may be gone; the plan has to say so."""
    target = budget(metric, share, HEAD_WARS)
    edits = trim(cost(), HEAD_WARS, target)
    assert left(edits, metric, list(HEAD_WARS)) <= target.keep
    assert count(cut(net(), plan(edits)), SIZE)[:2] == cost().plan(plan(edits))[:2]


@given(seed=SEEDS, scope=SCOPES, metric=METRICS, share=st.floats(0.2, 0.99))
def test_scores_at_every_site_lead_to_a_plan_within_the_target(
    seed: int, scope: Any, metric: Any, share: float
) -> None:
    scores = random_scores(seed, ("attn.heads", "attn.qk", *GATED))
    target = budget(metric, share, scores)
    edits = trim(cost(), scores, target, scope=scope)
    assert left(edits, metric, list(scores)) <= target.keep
    assert count(cut(net(), plan(edits)), SIZE)[:2] == cost().plan(plan(edits))[:2]


def test_heads_and_values_that_prefer_other_heads_still_leave_one() -> None:
    scores = {
        "blocks.0.attn.heads": torch.tensor([3.0, 2.0, 1.0]),
        "blocks.0.attn.v": torch.arange(24.0),
    }
    edits = trim(cost(), scores, Target(metric="macs", keep=0.99))
    assert 0 < left(edits, "macs", []) <= 0.99 * cost().dense_count.macs


def test_a_site_of_double_rate_loses_twice_the_share() -> None:
    scores = random_scores(0)
    fast = [name for name in scores if name.endswith("hidden")]
    target = Target(metric="units", keep=0.8)
    edits = trim(cost(), scores, target, scope="site", site_rates=dict.fromkeys(fast, 2.0))
    lost = {name: 1 - len(kept_at(edits, name)) / len(score) for name, score in scores.items()}
    slow = [share for name, share in lost.items() if name not in fast]
    for name in fast:
        assert lost[name] == pytest.approx(2 * sum(slow) / len(slow), abs=0.15)


@pytest.mark.parametrize("metric", ["macs", "params", "units"])
def test_more_than_there_is_is_refused(metric: Any) -> None:
    with pytest.raises(TargetError, match=rf"target\.{metric}=1000000000000: expected at most"):
        trim(cost(), random_scores(0), Target(metric=metric, keep=10**12))


def test_even_heads_lose_equally_many_dims() -> None:
    net = small_net()
    cost = Cost(net, SIZE)
    site = "blocks.0.attn.v"
    scores = {site: torch.arange(24, dtype=torch.float64)}
    keeps = trim(cost, scores, Target(metric="units", keep=0.5), even_heads=True)
    assert keeps[0].index == (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23)


@given(share=st.floats(0.05, 0.6), seed=SEEDS)
def test_units_are_trimmed_to_a_budget_in_blocks(share: float, seed: int) -> None:
    target, scores = Target(metric="blocks", keep=share), random_scores(seed)
    edits = trim(cost(), scores, target)
    limit, reached = cost().limit(target), left(edits, "macs", list(scores))
    assert limit - cost().dense_count.macs // 50 < reached <= limit
