from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import QUICK, Command
from vitrim.cli.evaluate import main


@pytest.fixture
def run(command: Command) -> Path:
    done = command("strength=1", "method=oneshot", "method.sampling.images=64", *QUICK)
    assert done.code == 0, done.message
    return done.report.parent


def test_a_finished_run_is_evaluated_as_its_report_says(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    main([str(run), "data=digits", "data.batch_size=90", "progress=false", "name=again"])
    result = json.loads((run / "eval" / "again.json").read_text())
    report = json.loads((run / "report.json").read_text())
    assert result["top1"] == pytest.approx(report["compact"]["top1"], abs=1e-4)
    assert result["top5"] == pytest.approx(report["compact"]["top5"], abs=1e-4)
    assert result["images"] == 360
    assert result["data"]["batch_size"] == 90
    assert {"network", "versions", "commit", "choices", "trainer"} <= result.keys()
    path = run / "eval" / "again.json"
    accuracy = f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % on 360 images of digits"
    assert capsys.readouterr().out == f"{accuracy}: {path}\n"
    for arguments, message in (
        (["data=none"], "data=none has no images"),
        ([], "You must specify 'data'"),
        (["data=digits", "data.foo=1"], "unknown key data.foo: expected one of _target_, batch"),
        (["data=digits", "data.held_out=2"], "data.held_out=2: expected a share"),
        (["data=digits", "name=../x"], "name=../x: expected letters"),
        (["data=digits", "trainer.limit_val_batches=1"], "every image counts"),
        (
            ["data=digits", "data._target_=os.system"],
            "data._target_=os.system: expected vitrim.data.",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(run), *arguments])
        assert message in str(stop.value), message
    assert [path.name for path in (run / "eval").iterdir()] == ["again.json"]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "data=digits"])
    assert "no recipe.yaml: expected the folder of a run" in str(stop.value)


@pytest.mark.parametrize("words", [[], ["run", "--nonsense"]])
def test_a_bad_flag_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "vitrim-eval: error: " in capsys.readouterr().err
