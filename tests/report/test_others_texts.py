"""Runs that somebody else wrote: what their texts and their files do to a report."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from reports import NO_WANDB, document, failure, save
from vitrim.cli.report import main
from vitrim.deploy.runfolder import RunFolderError, read_recipe, read_report
from vitrim.jobs.status import LOCK, STATUS, read_status, status_of
from vitrim.report.trial_figure import trials_of

LINK = "[a](http://x.org)<img src=x>|`b` $c$ :smile:"
REASON = "\x1b[2J\x1b]0;t\x07 # a\n\n![b](http://x.org) \u202e<script>"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Return a folder with a finished and a failed run, whose texts are markup of every kind."""
    folder = save(tmp_path / "=1+1" / "run", method=LINK)
    report = json.loads((folder / "report.json").read_text())
    report |= {"variant": "=cmd|'/c calc'!A1", "commit": LINK, "recipe_hash": "@SUM(1)"}
    report["=key"] = "-1+1"
    (folder / "report.json").write_text(json.dumps(report))
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "recipe.yaml").touch()
    (failed / STATUS).write_text(json.dumps({"status": "FAILED", "reason": REASON}))
    return tmp_path


def test_texts_of_others_are_texts_in_every_file(
    theirs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(theirs)  # the folder of the run is the first cell of a line
    main(["=1+1", "failed", "--html", "--out", "there", *NO_WANDB])
    main(["=1+1", "--paper", "--out", "there", *NO_WANDB])
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.split("\n"))
    assert r"\x1b[2J" in printed
    for name in ("report.md", "paper.md"):
        text = (theirs / "there" / "report" / name).read_text()
        assert all(line.isprintable() for line in text.split("\n"))
        reader = MarkdownIt("gfm-like", {"linkify": False})
        found = [child for token in reader.parse(text) for child in token.children or ()]
        images = [token.attrs["src"] for token in found if token.type == "image"]
        assert images == (["curve.png"] if name == "report.md" else [])
        assert not {token.type for token in found} & {"link_open", "html_inline", "html_block"}
    page = (theirs / "there" / "report" / "report.html").read_text()
    assert page.count("<script") == 2  # our own: the points of the chart, and what draws it
    assert not re.search(r"<img src=x|[\x00-\x09\x0b-\x1f\u202e]", page)
    with (theirs / "there" / "report" / "report.csv").open(newline="") as file:
        head, line = csv.reader(file)
    assert not [cell for cell in (*head, *line) if cell[:1] in ("=", "+", "-", "@")]


def test_a_report_folder_that_is_a_link_is_not_written_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "runs" / "run")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "runs" / "report"
    link.symlink_to(tmp_path / "elsewhere")
    assert f"{link} is a symbolic link" in failure(capsys, str(tmp_path / "runs"))
    with pytest.raises(SystemExit):
        main(["--paper", str(tmp_path / "runs")])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    capsys.readouterr()
    link.unlink()
    link.touch()
    assert f"{link} is a file" in failure(capsys, str(tmp_path / "runs"))


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("replace", [pipe, device])
def test_pipes_and_devices_are_omitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], replace: Callable[[Path], None]
) -> None:
    save(tmp_path / "good")
    replace(save(tmp_path / "bad") / "report.json")
    replace(save(tmp_path / "odd") / "diagnostics.json")
    replace(tmp_path / "odd" / "plan.json")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").touch()
    replace(tmp_path / "unfinished" / STATUS)
    main([str(tmp_path), "--html", *NO_WANDB])
    out, err = capsys.readouterr()
    assert f"omitted: {tmp_path / 'bad' / 'report.json'}: no valid JSON (no regular file)" in err
    assert f"{tmp_path / 'unfinished'}: unfinished: status.json cannot be read" in out
    assert out.count("strength=3 seed=0") == 2
    with pytest.raises(RunFolderError, match="no regular file"):
        read_report(tmp_path / "bad")


def test_a_lock_in_a_folder_of_others_is_neither_made_nor_followed(tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text('{"status": "RUNNING"}')
    assert status_of(tmp_path)[0] == "killed"
    assert not (tmp_path / LOCK).exists()
    (tmp_path / "precious").write_text("text")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    status_of(tmp_path)
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize(
    "status",
    ['{"status": [[1]]}', '{"status": "DONE", "reason": {"a": NaN}}', "[" * 10_000, "9e999"],
)
def test_any_status_gives_a_line(tmp_path: Path, status: str) -> None:
    (tmp_path / STATUS).write_text(status)
    assert isinstance(read_status(tmp_path / STATUS), dict)
    assert all(isinstance(text, str) for text in status_of(tmp_path))


@pytest.mark.parametrize(
    "recipe",
    [
        "model: {image_size: big}",
        "model: {mean: {a: 1}}",
        "model: {std: [.nan]}",
        "model: {mean: 3}",
    ],
)
def test_a_recipe_of_wrong_types_is_refused(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(RunFolderError, match=r"recipe\.yaml: of a wrong type or out of range"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("score", ["1e999", "NaN", f"1{'0' * 400}", "[]"])
def test_scores_of_trials_are_numbers(tmp_path: Path, score: str) -> None:
    from vitrim.deploy.runfolder import read_run

    folder = save(tmp_path / "run")
    plan = {"format": 2, "model": {}, "method": "dcvit", "edits": []}
    plan["provenance"] = {"blocks": ["a"]}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "diagnostics.json").write_text(f'{{"trials": {{"a": {score}}}}}')
    with pytest.raises(RunFolderError, match=r"diagnostics\.json"):
        trials_of(read_run(folder))


def test_a_report_of_any_depth_and_size_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "run")
    wide = {**document(), "wide": {str(i): i for i in range(20_000)}}
    for text in (json.dumps(wide), '{"format": 1, "a": ' + '{"a":' * 900 + "1" + "}" * 901):
        (folder / "report.json").write_text(text)
        message = failure(capsys, str(tmp_path))
        assert "report.json: " in message
        assert len(message) < 3_000
