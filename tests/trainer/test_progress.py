"""What a phase shows: its name, its speed, and a warning where images are waited for."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nets import small_net
from phase_runner import DIGITS, runner
from vitrim.trainer import progress
from vitrim.trainer.classify import Classify
from vitrim.trainer.progress import starved
from vitrim.trainer.recipe import Recipe


def test_the_speed_is_recorded_and_the_bar_names_the_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)
    phase = Classify(small_net(dtype=torch.float32, **DIGITS), recipe=recipe, n_classes=10)
    replace(runner(tmp_path), progress=True).run_or_load(tmp_path / "x", phase, name="dense")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert steps
    assert all(line["images_per_s"] > 0 and 0 <= line["waiting"] <= 1 for line in steps)
    assert all(line["lr"] <= 1e-3 and line["eta_s"] >= 0 for line in steps)
    assert steps[-1]["eta_s"] == 0
    shown = capsys.readouterr().out
    assert "dense, epoch 1/1" in shown
    assert "v_num" not in shown


def test_the_time_that_remains_is_logged_once_it_can_be_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "WORTH_SAYING_S", 0.0)
    recipe = Recipe(epochs=4, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)
    phase = Classify(small_net(dtype=torch.float32, **DIGITS), recipe=recipe, n_classes=10)
    with caplog.at_level(logging.INFO, "vitrim"):
        runner(tmp_path).run_or_load(tmp_path / "x", phase, name="dense")
    assert sum("dense: about " in line for line in caplog.messages) == 1


def test_the_warning_names_the_way_out() -> None:
    assert "data.workers" in starved(0.5)
