"""The MACs of blocks before and after: sums that the counter confirms, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nets import MODEL
from reports import PLAN, save
from vitrim import Plan, count
from vitrim.budget.cost import Cost
from vitrim.deploy.runfolder import read_run
from vitrim.network.skeleton import dense_skeleton, skeleton
from vitrim.plan import dumps
from vitrim.report.block_figure import bars, block_numbers, figure

EMPTY = Plan(model=MODEL, edits=())


def save_run(folder: Path, plan: Plan, **choices: object) -> Path:
    net = dense_skeleton(MODEL)
    macs = count(net, net.patch_embed.img_size).macs
    save(folder, **choices)
    report = json.loads((folder / "report.json").read_text())
    report["dense"]["macs"] = macs
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "plan.json").write_text(dumps(plan))
    return folder


def test_what_the_blocks_save_is_what_the_network_saves() -> None:
    net = dense_skeleton(MODEL)
    size = net.patch_embed.img_size
    cost = Cost(net, size)
    dense, kept = cost.macs_of_blocks(EMPTY), cost.macs_of_blocks(PLAN)
    assert [*dense] == [*kept] == ["blocks.0", "blocks.1"]
    assert dense["blocks.0"] == dense["blocks.1"]
    assert sum(dense.values()) < count(net, size).macs
    saved = count(net, size).macs - count(skeleton(PLAN), size).macs
    assert sum(dense.values()) - sum(kept.values()) == saved > 0
    assert all(kept[block] < dense[block] for block in dense)


def test_a_panel_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        read_run(save_run(tmp_path / "1", PLAN)),
        read_run(save_run(tmp_path / "2", PLAN, seed=1)),
        read_run(save_run(tmp_path / "3", EMPTY, strength=0.0)),
        read_run(save(tmp_path / "4", strength=1.0)),
    ]
    charts = bars(runs)
    assert [chart.title for chart in charts] == [f"vtp, vit_digits, strength={s}" for s in (3, 0)]
    assert charts[1].dense == charts[1].kept != charts[0].kept
    (picture,) = figure(runs).values()
    heights = [[round(patch.get_height(), 9) for patch in axes.patches] for axes in picture.axes]
    assert len(heights) == 2
    assert heights[0][:2] == [value / 1e6 for value in charts[0].dense.values()]
    assert heights[0][2:] == [value / 1e6 for value in charts[0].kept.values()]
    monkeypatch.setattr("vitrim.report.block_figure.MAX_PANELS", 1)
    (picture,) = figure(runs).values()
    assert len(picture.axes) == 1


def test_plans_that_cannot_be_read_have_no_bars(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "1", PLAN)
    (folder / "plan.json").write_text("{")
    assert figure([read_run(folder)]) == {}


def test_names_of_blocks() -> None:
    assert [block_numbers(name) for name in ("layers.0.blocks.11", "head")] == ["0.11", "head"]
