"""Reports as runs write them, for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nets import MODEL
from vitrim import Drop, Keep, LowRank, Plan
from vitrim.cli.report import main

NO_WANDB = ("--wandb", "disabled")
PLAN = Plan(
    model=MODEL,
    edits=(
        Keep(site="blocks.0.mlp.hidden", index=tuple(range(12))),
        LowRank(linear="blocks.0.attn.proj", rank=6),
        Drop(branch="blocks.1.attn"),
    ),
)


def document(
    *,
    method: str = "vtp",
    model: str = "vit_digits",
    strength: float | None = 3.0,
    target: dict[str, Any] | None = None,
    seed: int = 0,
    top1: float | None = 90.0,
    cut: float | None = 50.0,
    dense: float | None = 98.0,
    macs: int = 6_000_000,
    control: float | None = None,
) -> dict[str, Any]:
    accuracy = {"top1": dense, "top5": None if dense is None else 100.0}
    kept = macs / 10_000_000
    return {
        "format": 1,
        "vitrim": "0.1.0",
        "choices": {"model": model, "data": "digits", "method": method, "experiment": None},
        "strength": strength,
        "target": target or {"metric": "units", "keep": 0.7},
        "seed": seed,
        "recipe_hash": "1a2b3c4d",
        "series": f"{model}-digits-{method}-9f8e7d6c",
        "dense": {
            **accuracy,
            "params": 200_000,
            "macs": 10_000_000,
            "flops": 20_000_000,
            "latency_ms": 4.0,
        },
        "compact": {
            "params": 123_457,
            "macs": macs,
            "flops": 2 * macs,
            "top1": top1,
            "top5": top1 and 99.5,
            "latency_ms": 2.0,
        },
        "cut": {"top1": cut, "top5": cut},
        **({} if control is None else {"control": {"top1": control, "top5": 100.0, "epochs": 2}}),
        "kept": {"params": 0.617285, "macs": kept, "units": 0.7},
        "latency": {"batch": 1, "device": "cpu", "precision": "fp32", "threads": 2, "repeats": 10},
        "seconds": {"total": 1 / 3},
        "versions": {"torch": "2.11.0"},
        "commit": "abc",
        "dirty": False,
    }


def save(folder: Path, **choices: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("seed: 0\n")
    (folder / "report.json").write_text(json.dumps(document(**choices)))
    return folder


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as error:
        main([*argv, *NO_WANDB])
    assert error.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err
