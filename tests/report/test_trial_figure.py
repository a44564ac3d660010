"""What trials predict: which runs are read, the rank correlation, the figure, and refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from reports import NO_WANDB, failure, save
from vitrim.cli.report import main
from vitrim.deploy.runfolder import DIAGNOSTICS, read_run
from vitrim.plan import Plan, dumps
from vitrim.report.trial_figure import rank_correlations

SCORES = {"blocks.1": 0.3, "blocks.2": 0.1, "blocks.3": 0.2}


def ran(
    folder: Path,
    block: str,
    top1: float,
    *,
    trials: object = SCORES,
    in_plan: bool = False,
    **notes: object,
) -> Path:
    """Save a run that compressed one block and ended with this accuracy.

    Its trials are in the plan, as version 0.1.0 had them, or in diagnostics.json.
    """
    save(folder, method="dcvit")
    report = json.loads((folder / "report.json").read_text())
    report["compact"]["top1"] = top1
    report["dense"]["top1"] = 90.0
    (folder / "report.json").write_text(json.dumps(report))
    provenance = {"blocks": [block], **notes} | ({"trials": trials} if in_plan else {})
    (folder / "plan.json").write_text(dumps(Plan(model={}, edits=(), provenance=provenance)))
    if not in_plan:
        (folder / DIAGNOSTICS).write_text(json.dumps({"trials": trials}))
    return folder


def three(root: Path, *top1: float, in_plan: bool = False) -> list[Path]:
    return [
        ran(root / block, block, accuracy, in_plan=in_plan)
        for block, accuracy in zip(SCORES, top1, strict=True)
    ]


@pytest.mark.parametrize("in_plan", [False, True])
def test_scores_are_set_against_what_blocks_cost(tmp_path: Path, in_plan: bool) -> None:
    folders = three(tmp_path, 70.0, 88.0, 80.0, in_plan=in_plan)
    (group,) = rank_correlations([read_run(folder) for folder in folders])
    assert group.blocks == ["blocks.1", "blocks.2", "blocks.3"]
    assert group.scores == [0.3, 0.1, 0.2]
    assert group.lost == [20.0, 2.0, 10.0]
    assert group.correlation == pytest.approx(1.0)


def test_a_group_of_blocks_goes_by_its_first(tmp_path: Path) -> None:
    for block, top1 in zip(SCORES, (70.0, 88.0, 80.0), strict=True):
        ran(tmp_path / block, block, top1, blocks=[block, f"{block}9"])
    (group,) = rank_correlations([read_run(tmp_path / block) for block in SCORES])
    assert group.blocks == ["blocks.1", "blocks.2", "blocks.3"]
    assert group.lost == [20.0, 2.0, 10.0]


def test_the_correlation_has_a_sign(tmp_path: Path) -> None:
    (group,) = rank_correlations([read_run(folder) for folder in three(tmp_path, 88.0, 70.0, 80.0)])
    assert group.correlation == pytest.approx(-1.0)


def test_two_blocks_or_equal_ones_say_nothing(tmp_path: Path) -> None:
    folders = three(tmp_path, 70.0, 70.0, 70.0)
    assert rank_correlations([read_run(folder) for folder in folders]) == []
    assert rank_correlations([read_run(folder) for folder in folders[:2]]) == []


def test_runs_of_several_blocks_and_other_trials_are_apart(tmp_path: Path) -> None:
    folders = three(tmp_path, 70.0, 88.0, 80.0)
    ran(tmp_path / "both", "blocks.1", 60.0, blocks=["blocks.1", "blocks.2"])
    ran(tmp_path / "other", "blocks.1", 10.0, trials={"blocks.1": 5.0})
    everything = [read_run(tmp_path / name) for name in ("both", "other")]
    (group,) = rank_correlations([*everything, *(read_run(folder) for folder in folders)])
    assert group.lost == [20.0, 2.0, 10.0]


def test_the_command_prints_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three(tmp_path, 70.0, 88.0, 80.0)
    main([str(tmp_path), *NO_WANDB])
    sentence = "rank correlation of trial scores and lost top-1: 1.00 over 3 blocks"
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "report" / "report.md").read_text()
    with Image.open(io.BytesIO((tmp_path / "report" / "scores.png").read_bytes())) as image:
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 100


@pytest.mark.parametrize("in_plan", [False, True])
def test_plans_of_several_methods_say_nothing(tmp_path: Path, in_plan: bool) -> None:
    folders = three(tmp_path, 70.0, 88.0, 80.0, in_plan=in_plan)
    for folder in folders:
        document = json.loads((folder / "plan.json").read_text())
        document["provenance"] = {"steps": [{"decomposition": "loss"}, document["provenance"]]}
        (folder / "plan.json").write_text(json.dumps(document))
    assert rank_correlations([read_run(folder) for folder in folders]) == []


@pytest.mark.parametrize("in_plan", [False, True])
def test_scores_that_are_no_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_plan: bool
) -> None:
    ran(tmp_path / "run", "blocks.1", 60.0, trials={"blocks.1": "low"}, in_plan=in_plan)
    where = "plan.json: provenance.trials: " if in_plan else f"{DIAGNOSTICS}: trials: "
    assert where in failure(capsys, str(tmp_path))
