from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from command import EVERY_IMAGE, QUICK, Command
from vitrim.cli.evaluate import main


@pytest.fixture
def run(command: Command) -> Path:
    words = ("strength=1", "method=oneshot", "method.sampling.images=64", *QUICK)
    done = command(*words, EVERY_IMAGE)
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
        (["data=digits", "trainer.devices=2"], "trainer.devices=2: an evaluation is one process"),
        (["data=digits", "trainer.precision=fp16"], "trainer.precision=fp16: expected one of"),
        (["data=digits", "+trainer.gpus=1"], "unknown key trainer.gpus"),
        (["data=digits", "hydra.searchpath=[pkg://os]"], "pkg://os: expected a folder"),
        (["data=digits", "data.batch_size=${oc.env:HOME}"], "the environment is not read"),
        (
            ["data=digits", "data._target_=os.system"],
            "data._target_=os.system: expected vitrim.data.",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(run), *arguments])
        assert message in str(stop.value), message
    assert [path.name for path in (run / "eval").iterdir()] == ["again.json"]
    main([str(run), "data=digits", "data.batch_size=1", "progress=false"])
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: vit_tiny", "name: ${oc.env:HOME}"))
    with pytest.raises(SystemExit) as stop:
        main([str(run), "data=digits"])
    assert "model: expected the resolved model" in str(stop.value)


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


COLOURS = {"ant": "red", "bee": "green", "cat": "blue"}
OWN = (
    *("model=vit_digits", "model.args.in_chans=3", "model.num_classes=3"),
    *("method=oneshot", "data=imagefolder", "data.workers=0", "data.batch_size=12"),
    *("data.mixing.mixup_alpha=0", "data.mixing.cutmix_alpha=0", "data.augmentation.re_prob=0"),
    *("data.augmentation.auto_augment=null", "data.augmentation.color_jitter=0"),
)


def coloured(folder: Path, n: int, **classes: str) -> None:
    """Write `n` images of one colour per class folder."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(n):
            Image.new("RGB", (8, 8), colour).save(folder / name / f"{colour}-{number}.png")


def test_labels_are_the_runs_classes_by_name(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, some, others, numbers, flat = (tmp_path / name for name in ("own", "b", "c", "d", "e"))
    coloured(own / "train", 12, **COLOURS)
    coloured(own / "val", 2, **COLOURS)
    training = (
        *QUICK, EVERY_IMAGE, "trainer.limit_train_batches=1.0", "model.training.epochs=12",
    )  # fmt: skip
    done = command(*OWN, *training, "strength=0", f"data.root={own}")
    assert done.code == 0, done.message
    run, report = done.report.parent, json.loads(done.report.read_text())
    assert report["classes"] == ["ant", "bee", "cat"]
    assert report["compact"]["top1"] == 100

    coloured(some / "val", 2, bee="green", cat="blue")
    coloured(others / "val", 2, bee="green", cat="blue", zebra="red")
    coloured(numbers / "val", 2, **{"0": "red", "2": "blue"})
    coloured(flat, 2, val="blue")
    (flat / "labels.csv").write_text("blue-0.png,cat\nblue-1.png,cat\n")

    def evaluate(root: Path, *words: str) -> str:
        capsys.readouterr()
        arguments = ["data=imagefolder", f"data.root={root}", "data.workers=0", "progress=false"]
        main([str(run), *arguments, *words])
        return capsys.readouterr().out

    known = "top-1 100.00 %, top-5 100.00 % on 4 images of imagefolder (2 of 3 classes)"
    assert known in evaluate(some)
    assert known in evaluate(others, "data.classes=[bee,cat]")
    assert known in evaluate(numbers)
    assert "100.00 % on 2 images" in evaluate(flat, "data.val_labels=labels.csv")
    with pytest.raises(SystemExit, match="does not know: zebra; it knows ant, bee, cat"):
        evaluate(others)
    done = command(*OWN, *QUICK, "strength=1", f"data.root={others}", f"from_run={run}")
    assert "does not know: zebra; it knows ant, bee, cat" in done.message

    del report["classes"]  # as runs of earlier versions
    (run / "report.json").write_text(json.dumps(report))
    assert "100.00 % on 6 images" in evaluate(own)
    with pytest.raises(SystemExit, match=r"has 2 classes \(bee, cat\), the network in .* has 3"):
        evaluate(some)
