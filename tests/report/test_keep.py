"""vitrim-report --keep: a file of results/ from reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reports import NO_WANDB, document
from vitrim.cli.report import main
from vitrim.deploy.runfolder import read_run
from vitrim.paper.results import results
from vitrim.report.keep import KeepError, command, keep, result


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Return a root with two strengths of one command, two seeds each."""
    for strength in (2.0, 4.0):
        for seed in (0, 1):
            made(tmp_path / "outputs", strength=strength, seed=seed, top1=90.0 - strength + seed)
    return tmp_path / "outputs"


def made(root: Path, *, more: dict[str, Any] | None = None, **chosen: Any) -> None:
    strength, seed = chosen.get("strength", 3.0), chosen.get("seed", 0)
    words = ["experiment=demo", f"strength={strength:g}", f"seed={seed}"]
    report = {**document(**chosen), "overrides": words, **(more or {})}
    folder = root / f"s{strength:g}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))


def test_rows_are_kept_with_their_provenance(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sweep.parent)
    main(["outputs", "--keep", "mine", *NO_WANDB])
    assert "results/mine.json" in capsys.readouterr().out
    (kept,) = results(sweep.parent / "results")
    assert kept.command == "vitrim -m experiment=demo strength=2,4 seed=0,1"
    assert (kept.commit, kept.versions["torch"], kept.setting) == ("abc", "2.11.0", "own")
    assert kept.hardware == "cpu, 2 threads"
    assert [line["budget"] for line in kept.figures] == ["strength=2", "strength=4"]
    first = kept.figures[0]
    assert (first["top1"], first["top1_std"], first["seeds"]) == (88.5, 0.71, "0, 1")
    assert (first["kept_macs_percent"], first["top1_dense"]) == (60.0, 98.0)
    assert first["recipe_hash"] == "1a2b3c4d"


def test_a_kept_table_is_not_replaced(sweep: Path, tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in sorted(sweep.iterdir())]
    keep("mine", runs, tmp_path)
    with pytest.raises(KeepError, match=r"mine\.json exists; choose another name"):
        keep("mine", runs, tmp_path)
    with pytest.raises(KeepError, match="expected small letters"):
        keep("../mine", runs, tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dirty": True}, "changes that no commit has"),
        ({"commit": "def"}, "differ in the commit: abc, def"),
        ({"versions": {"torch": "2.12.0"}}, "differ in the version of torch"),
        ({"overrides": ["strength=2", "seed=0"]}, "not those of one command"),
        ({"overrides": None}, "has no overrides"),
    ],
)
def test_what_is_no_table_of_one_command_is_refused(
    sweep: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    made(sweep, strength=2.0, seed=0, more=more)
    runs = [read_run(folder) for folder in sorted(sweep.iterdir())]
    with pytest.raises(KeepError, match=message):
        keep("mine", runs, tmp_path)
    assert not (tmp_path / "mine.json").exists()


def test_folders_are_words_in_capitals_in_the_command() -> None:
    record = {
        "overrides": ["method=oneshot", "method.sites=[mlp,qk]"],
        "choices.data": "imagefolder",
        "seed": 0,
    }
    expected = "vitrim method=oneshot 'method.sites=[mlp,qk]' data.root=IMAGES"
    assert command([record]) == expected
    assert command([record], checkpoint=True) == f"{expected} model.checkpoint=WEIGHTS"


def test_weights_that_were_trained_further_are_in_the_command(sweep: Path) -> None:
    folder = sorted(sweep.iterdir())[0]
    (folder / "recipe.yaml").write_text("model: {checkpoint: /somewhere/weights.safetensors}")
    runs = [read_run(folder) for folder in sorted(sweep.iterdir())]
    assert "model.checkpoint=WEIGHTS" in str(result(runs)["command"])
    assert "/somewhere" not in json.dumps(result(runs))
