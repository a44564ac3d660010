"""The accuracy of the dense network that was trained as long, in every form of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports import NO_WANDB, save
from vitrim.cli.report import main
from vitrim.deploy.runfolder import read_run
from vitrim.report.figure import control_levels, dense_levels
from vitrim.report.keep import result
from vitrim.report.summary import Spread, summarise


def test_reports_compare_with_the_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, control in ((0, 98.5), (1, 99.5)):
        save(tmp_path / f"a{seed}", seed=seed, top1=95.0 + seed, dense=98.0, control=control)
    main([str(tmp_path), "--html", *NO_WANDB])
    printed = capsys.readouterr().out
    table = printed.splitlines()[: printed.splitlines().index("")]
    assert "control" in printed
    assert max(map(len, map(str.rstrip, table))) <= 100
    text = (tmp_path / "report" / "report.md").read_text()
    head, _, line = text.splitlines()[:3]
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert (cells["top-1 control"], cells["to control"]) == ("99.00", "-3.50")
    assert "*control*: the dense network, trained further" in text
    assert "control: the dense network" in (tmp_path / "report" / "report.html").read_text()
    assert "control.top1" in (tmp_path / "report" / "report.csv").read_text()
    (row,) = summarise([read_run(tmp_path / f"a{seed}") for seed in (0, 1)])
    assert row.spreads["to_control"] == Spread(-3.5, 0.0, 2)
    assert (control_levels([row]), dense_levels([row])) == ([99.0], [98.0])


def test_reports_without_one_do_not_mention_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a")
    main([str(tmp_path), "--html", *NO_WANDB])
    texts = [capsys.readouterr().out]
    texts += [(tmp_path / "report" / f"report.{kind}").read_text() for kind in ("md", "html")]
    assert not any("control" in text for text in texts)
    (row,) = summarise([read_run(tmp_path / "a")])
    assert control_levels([row]) == []


def test_kept_results_have_it(tmp_path: Path) -> None:
    (path,) = [save(tmp_path / "a", control=98.5)]
    run = read_run(path)
    record = {**run.record, "overrides": ["method=vtp"], "vitrim": "0.2.0"}
    (line,) = result([run._replace(record=record)])["figures"]  # type: ignore[misc]
    assert line["top1_control"] == 98.5
