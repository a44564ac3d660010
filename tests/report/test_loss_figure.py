"""Predicted and measured losses: which runs are read, the table, the figure, and refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reports import NO_WANDB, failure, save
from vitrim.cli.report import main
from vitrim.deploy.runfolder import DIAGNOSTICS, read_run
from vitrim.report.loss_figure import (
    MAX_COLUMNS,
    MeasuredEdit,
    measured_losses,
    rank_correlation,
    tables,
)


def edit(kind: str, name: str, share: float, predicted: float, measured: float) -> dict[str, Any]:
    return {
        **{"kind": kind, "name": name, "share": share},
        **{"predicted": predicted, "measured": measured},
    }


EDITS = [
    edit("hidden", "blocks.0.mlp.hidden", 0.25, 0.01, 0.02),
    edit("hidden", "blocks.0.mlp.hidden", 0.5, 0.04, 0.05),
    edit("hidden", "blocks.1.mlp.hidden", 0.25, 0.001, 0.0005),
    edit("ranks", "blocks.0.attn.qkv", 0.625, 0.1, 0.1),
    edit("ranks", "blocks.1.attn.qkv", 0.614, 0.2, 0.3),
    edit("branches", "blocks.0.attn", 1.0, 0.0, 0.7),
    edit("branches", "blocks.0", 1.0, 0.0, 1.25),
]


def measured(folder: Path, losses: object, *, series: str = "a", **choices: object) -> Path:
    save(folder, **{"method": "joint", **choices})
    report = json.loads((folder / "report.json").read_text())
    report["series"] = f"vit_digits-digits-joint-{series}"
    (folder / "report.json").write_text(json.dumps(report))
    (folder / DIAGNOSTICS).write_text(json.dumps({"losses": losses}))
    return folder


def test_a_line_per_block_and_a_column_per_share(tmp_path: Path) -> None:
    ((caption, table),) = tables([read_run(measured(tmp_path / "run", EDITS))])
    assert caption == "vit_digits on digits, joint, seed 0"
    assert table == [
        [
            *("block", "mlp.hidden 25 %", "mlp.hidden 50 %", "attn.qkv ranks 61 to 62 %"),
            *("attn dropped", "block dropped"),
        ],
        [
            *("blocks.0", "0.01 -> 0.02 (2.00x)", "0.04 -> 0.05 (1.25x)"),
            *("0.1 -> 0.1 (1.00x)", "0.7", "1.25"),
        ],
        ["blocks.1", "0.001 -> 0.0005 (0.50x)", "-", "0.2 -> 0.3 (1.50x)", "-", "-"],
    ]


def test_names_without_a_block_and_too_many_columns(tmp_path: Path) -> None:
    edits = [edit("hidden", f"layer-{i}", 0.5, 0.1, 0.1) for i in range(MAX_COLUMNS + 2)]
    ((caption, table),) = tables([read_run(measured(tmp_path / "run", edits))])
    assert caption.endswith("(2 columns not shown)")
    assert [len(line) for line in table] == [MAX_COLUMNS + 1] * 2
    assert [line[:2] for line in table] == [
        ["block", "layer-0 hidden 50 %"],
        ["-", "0.1 -> 0.1 (1.00x)"],
    ]


def test_equal_losses_and_other_runs_of_a_series_are_shown_once(tmp_path: Path) -> None:
    folders = [
        measured(tmp_path / "1", EDITS, strength=1.0),
        measured(tmp_path / "2", EDITS[1:], strength=2.0, seed=1),
        measured(tmp_path / "3", EDITS, series="b"),
        measured(tmp_path / "4", EDITS[:4], series="c"),
        measured(tmp_path / "5", [], series="d"),
        save(tmp_path / "6"),
    ]
    found = measured_losses([read_run(folder) for folder in folders])
    assert [(of_run.record["series"][-1], len(of_run.edits)) for of_run in found] == [
        ("a", 7),
        ("c", 4),
    ]


def test_the_correlation_is_of_what_was_predicted() -> None:
    edits = [MeasuredEdit(**row) for row in EDITS]
    assert rank_correlation(edits) == pytest.approx(1.0)
    assert rank_correlation([*edits[:2], *edits[5:]]) is None
    assert rank_correlation([edits[0]] * 3) is None


def test_the_command_prints_draws_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tmp_path / "a", EDITS)
    measured(tmp_path / "b", EDITS[:5], series="b", top1=None)
    main([str(tmp_path), "--html", *NO_WANDB])
    sentence = "rank correlation of predicted and measured loss: 1.00 over 5 edits"
    assert capsys.readouterr().out.count(sentence) == 2
    report = tmp_path / "report"
    text, page = ((report / name).read_text() for name in ("report.md", "report.html"))
    assert text.count(sentence) == 2
    assert "](losses.png)" in text
    assert text.count("0.04 -> 0.05 (1.25x)") == page.count("0.04 -&gt; 0.05 (1.25x)") == 2
    assert "Predicted and measured losses of single edits" in page
    with Image.open(io.BytesIO((report / "losses.png").read_bytes())) as image:
        assert image.width > 2000
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 100


def test_losses_that_are_only_measured_are_not_drawn(tmp_path: Path) -> None:
    measured(tmp_path / "run", EDITS[5:])
    main([str(tmp_path), *NO_WANDB])
    assert not (tmp_path / "report" / "losses.png").exists()
    assert "| blocks.0 | 0.7 | 1.25 |" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    "losses",
    [
        "much",
        {"0": EDITS[0]},
        [None],
        [{**EDITS[0], "kind": "$x$"}],
        [{**EDITS[0], "name": "x" * 257}],
        [{**EDITS[0], "name": "<b>"}],
        [{**EDITS[0], "name": 3}],
        [{**EDITS[0], "share": 1.5}],
        [{**EDITS[0], "share": True}],
        [{**EDITS[0], "predicted": None}],
        [{**EDITS[0], "measured": 1e300}],
        [EDITS[0], {"kind": "qk"}],
        [EDITS[0]] * 10_001,
    ],
    ids=range(13),
)
def test_losses_that_no_run_wrote_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], losses: object
) -> None:
    folder = measured(tmp_path / "run", losses)
    message = failure(capsys, str(tmp_path))
    assert f"{folder / DIAGNOSTICS}: losses: " in message
    assert "expected " in message
    assert len(message) < 500
