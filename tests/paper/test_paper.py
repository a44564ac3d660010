"""Published rows: what is in the package, and which run is which row; and results of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitrim.cli.compose import CONF
from vitrim.cli.report import main
from vitrim.paper import match, published
from vitrim.paper.results import ABSENT, FOLDER, ResultError, results
from vitrim.report.papers import SOURCES, commands, sections


def record(
    experiment: str | None, method: str, model: str, strength: float | None, **more: Any
) -> dict[str, Any]:
    return {
        "choices.experiment": experiment,
        "choices.method": method,
        "choices.model": model,
        "strength": strength,
        **more,
    }


def test_every_row_says_where_it_was_read_and_whether_that_was_checked() -> None:
    rows = published()
    assert len(rows) == 379
    assert all(row.source for row in rows)
    doubtful = [row for row in rows if any(w in row.source for w in ("memory", "second-hand"))]
    assert doubtful
    assert not any(row.verified for row in doubtful)
    unverified = ("summary", "memory", "none")
    assert all(row.verified == (row.evidence not in unverified) for row in rows)
    assert {row.evidence_level for row in rows if row.evidence == "quoted"} == {"quoted"}
    assert all(row.top1 is None for row in rows if row.evidence == "none")


def test_rows_name_experiments_that_exist() -> None:
    names = {row.experiment for row in published()} - {""}
    assert {"aiminify/vit_base", "vtp/imagenet"} <= names
    assert all((CONF / "experiment" / f"{name}.yaml").is_file() for name in names)


@pytest.mark.parametrize("experiment", ["aiminify/deit_base", None])
def test_a_run_finds_its_row_by_experiment_or_by_method_and_model(experiment: str | None) -> None:
    row = match(record(experiment, "aiminify", "deit_base", 3.0))
    assert row is not None
    assert (row.params, row.flops, row.top1) == (67_218_363, 27_508_995_072, 76.23)
    assert match(record(experiment, "aiminify", "deit_base", 2.0)) is None
    assert match(record(None, "oneshot", "deit_base", 3.0)) is None


def test_macs_are_half_of_the_flops() -> None:
    row = match(record("vtp/imagenet", "vtp", "deit_base", 4.0))
    assert row is not None
    assert (row.params, row.flops, row.top1) == (48_000_000, 20_000_000_000, 80.7)


BUDGET = {"target.metric": "blocks", "target.keep": 2, "samples": 50}


@pytest.mark.parametrize(
    ("experiment", "more", "expected"),
    [
        ("dcvit/table3", BUDGET, "MACs of 2 dropped blocks, 50"),
        ("dcvit/table3", BUDGET | {"variant": "trial.width=0.4997"}, None),
        ("dcvit/table3", BUDGET | {"target.keep": 0.7}, None),
        ("dcvit/table3", BUDGET | {"choices.data": "none"}, "dropping 2 blocks"),
        ("dcvit/table3_practise", BUDGET | {"samples": 100}, "MACs of 2 dropped blocks, 100"),
        ("dcvit/table3_practise", BUDGET | {"variant": "tuning.epochs=6000"}, "MACs of 2"),
        ("dcvit/table3_practise", BUDGET | {"variant": "tuning.epochs=7"}, None),
    ],
)
def test_a_few_shot_run_finds_the_row_of_its_budget_images_and_method(
    experiment: str, more: dict[str, Any], expected: str | None
) -> None:
    row = match(record(experiment, "dcvit", "vit_base", None, **more))
    assert (row.setting if row else None) == expected or (
        expected and row and expected in row.setting
    )
    if "6000" in str(more.get("variant")):
        assert row is not None
        assert row.method == "PRACTISE, longer"


def test_a_transferred_network_finds_the_row_of_its_origin_and_data() -> None:
    more = {"choices.data": "pets", "samples": None}
    for origin, method in (("of dcvit", "DC-ViT"), ("of dense", "original")):
        row = match(record("dcvit/table7", "transfer", "vit_base", 0.0, variant=origin, **more))
        assert row is not None
        assert (row.method, row.dataset) == (method, "Pets")


def test_another_network_is_not_the_row_of_an_experiment() -> None:
    assert match(record("aiminify/deit_base", "aiminify", "vit_tiny", 3.0)) is None


def test_every_row_of_the_four_sources_has_a_command_or_says_that_it_has_none() -> None:
    rows = [row for row in published() if row.paper in SOURCES]
    without = [row for row in rows if not row.experiment]
    reasons = ("no command of ours", "from its own paper", "of Table 8's rows")
    assert all(any(reason in row.setting for reason in reasons) for row in without)
    assert len(commands()) == len(rows) - len(without)


def test_results_in_the_repository_are_complete() -> None:
    kept = results()
    assert FOLDER.is_dir()
    assert {"oneshot_vit_tiny", "mixed_rank_vit_tiny", "dcvit_vit_tiny", "vtp_cifar10_tiny"} <= {
        result.name for result in kept
    }
    for result in kept:
        assert result.versions["torch"]
        assert result.setting == "own" or all(line["experiment"] for line in result.figures)


def test_rows_of_results_in_a_papers_setting_are_published_rows() -> None:
    known = {(row.experiment, row.strength, row.overrides) for row in published()}
    for result in results():
        if result.setting == "paper":
            for line in result.figures:
                assert (line["experiment"], line["strength"], line["overrides"]) in known


RESULT = {
    "format": 1,
    "title": "t",
    "setting": "paper",
    "command": "vitrim",
    "commit": None,
    "versions": {"torch": "2"},
    "data": "d",
    "hardware": "h",
    "seed": 0,
    "figures": [
        {"experiment": "vtp/imagenet", "strength": 2, "overrides": "model=deit_base", "top1": 81.0}
    ],
}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "no valid JSON"),
        ('{"format": 2}', "expected format 1"),
        (json.dumps({**RESULT, "seed": "0"}), "seed"),
        (json.dumps({**RESULT, "colour": "red"}), "colour"),
        (json.dumps({**RESULT, "figures": []}), "no figures"),
        (json.dumps({**RESULT, "figures": [{"top1": [1]}]}), "figures.0"),
        (json.dumps({**RESULT, "setting": "ours"}), "setting"),
    ],
)
def test_a_malformed_result_is_refused_by_name(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ResultError, match=r"bad\.json") as error:
        results(tmp_path)
    assert expected in str(error.value)


def test_a_result_in_a_papers_setting_is_compared_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RESULT))
    vtp = sections([], results(tmp_path))[0]
    line = next(line for line in vtp.lines if "20%" in line[3])
    assert line[2] == "ImageNet-1K"
    assert line[4:13] == [
        "67.300",
        "not run",
        "-",
        "13.800",
        "not run",
        "-",
        "81.30",
        "81.00",
        "-0.30",
    ]


def test_the_paper_report_shows_every_row_and_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--paper"])
    printed = capsys.readouterr().out
    assert all(f"{source}: published and ours" in printed for source in SOURCES)
    assert "Our own setting: " in printed
    assert ABSENT not in printed
    assert "not run" in printed
    assert not list(tmp_path.iterdir())
    (tmp_path / "outputs").mkdir()
    main(["--paper"])
    text = (tmp_path / "outputs" / "report" / "paper.md").read_text()
    assert "| 81.30 | not run | - | - | - | - | quoted | quoted |" in text
    assert "`vitrim experiment=vtp/imagenet strength=2 model=deit_base`" in text
    with pytest.raises(SystemExit):
        main(["--paper", "elsewhere"])


def test_without_results_a_sentence_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert results(tmp_path / "absent") == []
    monkeypatch.setattr("vitrim.report.tables.results", lambda: results(tmp_path / "absent"))
    (tmp_path / "runs").mkdir()
    main(["--paper", str(tmp_path / "runs")])
    assert ABSENT in capsys.readouterr().out
    assert ABSENT in (tmp_path / "runs" / "report" / "paper.md").read_text()


@pytest.mark.parametrize("option", ["only", "allowed_blocks"])
def test_options_of_an_earlier_version_find_their_row(option: str) -> None:
    target = {"target.metric": "blocks", "target.keep": 0.67}
    variant = f"{option}=[blocks.3]"
    row = match(record("dcvit/table8", "dcvit", "vit_base", None, variant=variant, **target))
    assert row is not None
    assert "method.allowed_blocks=[blocks.3]" in row.overrides
