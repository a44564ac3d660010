"""Sites, scores of them, and a plan from anybody's scores."""

from pathlib import Path

import pytest
import torch

import vitrim
from nets import images, small_net
from vitrim.errors import VitrimError

IMAGES = images(dtype=torch.float32, batch=24)


def net() -> torch.nn.Module:
    return small_net(dtype=torch.float32)


def test_sites_are_a_table() -> None:
    found = vitrim.sites(net())
    assert [(site.kind, site.size) for site in found][-1] == ("hidden", 48)
    lines = repr(found).splitlines()
    assert lines[0].split() == ["name", "kind", "size"]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 1 + len(found)
    long = repr(type(found)([*found] * 9)).splitlines()
    assert len(long) < 20
    assert "more" in long[12]


@pytest.mark.parametrize("criterion", ["obs_greedy", "taylor", "variance", "magnitude"])
def test_scores_become_a_plan_and_a_network_that_loads(criterion: str, tmp_path: Path) -> None:
    dense = net()
    scores = vitrim.score(dense, IMAGES, criterion=criterion, kinds=["mlp", "qk"])
    plan = vitrim.trim(dense, scores, macs=0.8)
    compact = vitrim.cut(dense, plan)
    again, _ = vitrim.load(vitrim.save(tmp_path, compact, plan))
    assert torch.equal(again(IMAGES), compact(IMAGES))
    assert vitrim.count(compact, 32).macs <= 0.8 * vitrim.count(dense, 32).macs


def test_own_scores_decide_which_units_stay() -> None:
    dense = net()
    scores = {"blocks.0.mlp.hidden": torch.arange(48.0)}
    plan = vitrim.trim(dense, scores, params=0.98)
    (keep,) = plan.keeps()
    assert keep.index == tuple(range(48 - len(keep.index), 48))
    assert plan.model == vitrim.plan_for(dense).model


def test_a_plan_needs_no_name_and_no_arguments(tmp_path: Path) -> None:
    dense = net()
    plan = vitrim.plan_for(dense, [vitrim.Drop(branch="blocks.1.mlp")])
    compact = vitrim.cut(dense, plan)
    again, _ = vitrim.load(vitrim.save(tmp_path, compact, plan))
    assert torch.equal(again(IMAGES), compact(IMAGES))


def test_bad_scores_and_budgets_are_refused() -> None:
    dense, scores = net(), {"blocks.0.mlp.hidden": torch.ones(47)}
    with pytest.raises(VitrimError, match="expected 48 finite scores"):
        vitrim.trim(dense, scores, macs=0.9)
    with pytest.raises(VitrimError, match="there is no such site"):
        vitrim.trim(dense, {"blocks.9": torch.ones(3)}, macs=0.9)
    with pytest.raises(VitrimError, match="budget: none: expected one of"):
        vitrim.trim(dense, scores)
    with pytest.raises(VitrimError, match=r"mac=0.9: expected one of macs"):
        vitrim.trim(dense, scores, mac=0.9)
    with pytest.raises(VitrimError, match="images: this criterion needs some"):
        vitrim.score(dense)
    with pytest.raises(VitrimError, match="criterion=best: expected one of"):
        vitrim.score(dense, IMAGES, criterion="best")
