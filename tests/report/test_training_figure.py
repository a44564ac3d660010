"""Loss curves from metrics.jsonl: a panel for each phase, and lines that no run wrote."""

from __future__ import annotations

import json
from pathlib import Path

from reports import NO_WANDB, save
from vitrim.cli.report import main
from vitrim.deploy.runfolder import Run, read_run
from vitrim.report.training_figure import figure, losses_by_phase


def logged(folder: Path, *entries: object, torn: str = "", **choices: object) -> Run:
    save(folder, **choices)
    lines = [json.dumps(entry) for entry in entries]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, torn]))
    return read_run(folder)


def steps_of(phase: str, first: int, *losses: float) -> list[dict[str, object]]:
    return [
        {"phase": phase, "step": first + 10 * i, "loss": loss, "epoch": 0}
        for i, loss in enumerate(losses)
    ]


def test_a_panel_for_each_phase(tmp_path: Path) -> None:
    runs = [
        logged(
            tmp_path / "1",
            *steps_of("dense", 9, 2.0, 1.0, 0.5),
            {"phase": "dense", "step": 29, "top1": 90.0},
            *steps_of("gating", 40, 300.0, 1.0),
        ),
        logged(tmp_path / "2", *steps_of("gating", 40, 2.0, 0.9), method="cd"),
        read_run(save(tmp_path / "3", seed=1)),
    ]
    phases = losses_by_phase(runs)
    assert [*phases] == ["dense", "gating"]
    assert [(line.steps, line.losses) for line in phases["dense"]] == [
        ([0, 10, 20], [2.0, 1.0, 0.5])
    ]
    assert len(phases["gating"]) == 2
    (picture,) = figure(runs).values()
    assert [axes.get_title() for axes in picture.axes] == ["dense", "gating"]
    assert [axes.get_yscale() for axes in picture.axes] == ["linear", "log"]
    assert [len(axes.get_lines()) for axes in picture.axes] == [1, 2]


def test_lines_that_are_no_losses_are_skipped(tmp_path: Path) -> None:
    odd = [
        *([], None, {"phase": 1, "step": 1, "loss": 1.0}, {"phase": "a", "step": -1, "loss": 1.0}),
        *({"phase": "a", "step": 2, "loss": x} for x in (None, "1", True, 1e400, float("nan"))),
        {"phase": "a", "step": None, "loss": 1.0},
    ]
    known = steps_of("$a^{", 3, 1.0, 0.5)
    run = logged(tmp_path / "1", *odd, *known, torn='{"phase": "a", "st')
    assert [*losses_by_phase([run])] == ["$a^{"]
    main([str(tmp_path), *NO_WANDB])
    assert (tmp_path / "report" / "training.png").is_file()


def test_without_a_training_there_is_no_figure(tmp_path: Path) -> None:
    run = logged(tmp_path / "1", *steps_of("dense", 0, 1.0))  # one point is no curve
    assert figure([run]) == {}
