"""When a run is shown next to a published row, and what is said of one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reports import NO_WANDB, document
from vitrim.cli.report import main
from vitrim.deploy.runfolder import read_run
from vitrim.paper import match
from vitrim.paper.agreement import WEIGHTS, differences
from vitrim.report.compare import TITLE

SAME: dict[str, Any] = {
    "weights": {
        "name": WEIGHTS["deit_base"],
        "source": "timm",
        "tag": "fb_in1k",
        "sha256": "ab" * 32,
    },
    "dataset": {"name": "imagefolder", "classes": 1000, "content": "0123456789abcdef"},
    "evaluated_images": 50_000,
    "overrides": ["experiment=aiminify/deit_base", "strength=3", "seed=1", "data.workers=8"],
}


def save(folder: Path, changes: dict[str, Any]) -> Path:
    report = document(method="aiminify", model="deit_base") | SAME
    report |= {key: value for key, value in changes.items() if key != "compact"}
    report["choices"] |= {"data": "imagefolder", "experiment": "aiminify/deit_base"}
    size = {"params": 67_218_363, "flops": 27_508_995_072}
    report["compact"] |= size | changes.get("compact", {})
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"weights": None}, ["weights: not recorded"]),
    (
        {"weights": SAME["weights"] | {"source": "trained", "name": "deit_base_patch16_224"}},
        ["weights: deit_base_patch16_224 (trained"],
    ),
    (
        {"weights": SAME["weights"] | {"name": "deit_base_patch16_224.other"}},
        ["weights: deit_base_patch16_224.other"],
    ),
    ({"dataset": SAME["dataset"] | {"classes": 10}}, ["data set: imagefolder with 10 classes"]),
    ({"dataset": None}, ["data set: not recorded"]),
    ({"evaluated_images": 20}, ["evaluated images: 20, not 50,000"]),
    (
        {"overrides": [*SAME["overrides"], "trainer.limit_val_batches=1"]},
        ["recipe: trainer.limit_val_batches=1"],
    ),
    ({"overrides": [*SAME["overrides"], "+data.batch_size=2"]}, ["recipe: +data.batch_size=2"]),
    ({"overrides": None}, ["recipe: not recorded"]),
    (
        {
            "weights": None,
            "evaluated_images": None,
            "compact": {"top1": None},
            "overrides": ["experiment=aiminify/deit_base", "trainer.limit_val_batches=1"],
        },
        [],
    ),
    (
        {"compact": {"top1": None}, "overrides": ["model.image_size=384"]},
        ["recipe: model.image_size=384"],
    ),
]


@pytest.mark.parametrize(("changes", "expected"), CHANGES, ids=range(len(CHANGES)))
def test_what_differs_is_named(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    record = read_run(save(tmp_path / "run", changes)).record
    row = match(record)
    assert row is not None
    found = differences(record, row)
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_a_run_on_20_images_is_not_put_next_to_a_published_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = {"weights": SAME["weights"] | {"source": "trained"}, "evaluated_images": 20}
    save(tmp_path / "run", trained | {"compact": {"top1": 0.0}})
    for words in ([], ["--paper"], ["--html"]):
        main([*words, str(tmp_path), *NO_WANDB])
        printed = capsys.readouterr().out
        assert "evaluated images: 20, not 50,000" in printed
        assert "76.23 | 0.00" not in printed
    report = tmp_path / "report"
    for name in ("report.md", "paper.md", "report.html"):
        text = (report / name).read_text()
        assert "0.00 | -76.23" not in text
        assert "20, not 50,000" in text
    assert "| 76.23 | not run | - |" in (report / "paper.md").read_text()


def test_the_same_run_on_all_images_is(tmp_path: Path) -> None:
    save(tmp_path / "run", {"compact": {"top1": 76.0}})
    main(["--paper", str(tmp_path), *NO_WANDB])
    text = (tmp_path / "report" / "paper.md").read_text()
    assert "| 67.218 | 67.218 | 0 | 13.754 | 13.754 | 0 | 76.23 | 76.00 | -0.23 |" in text
    assert "not compared" not in text


def test_the_comparison_has_images_top_5_and_latency(tmp_path: Path) -> None:
    save(tmp_path / "run", {"compact": {"top1": 76.0, "top5": 93.0}})
    main([str(tmp_path), *NO_WANDB])
    text = (tmp_path / "report" / "report.md").read_text().partition(TITLE)[2]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    pairs = [*zip(lines[0], lines[2], strict=True)]
    assert ("images", "50,000") in pairs
    assert pairs[pairs.index(("top-5", "93.00")) + 1] == ("published", "-")
    assert ("latency ms", "4 -> 2") in pairs


def test_runs_on_other_images_are_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "few", {"evaluated_images": 20, "compact": {"top1": 10.0}})
    save(tmp_path / "all", {"compact": {"top1": 76.0}, "seed": 1})
    main([str(tmp_path), *NO_WANDB])
    printed = capsys.readouterr().out
    assert "10.00" in printed
    assert "76.00" in printed
    assert "43.00" not in printed
