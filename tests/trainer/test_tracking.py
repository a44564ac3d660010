from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import wandb

from vitrim.trainer.tracking import Tracker

SUMMARY = {"strength": 3.0, "compact": {"top1": 97.0, "macs": 10}}


def test_metrics_are_on_disk_whatever_the_service(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "none", group="g", config={})
    tracker.phase = "dense"
    tracker.log_metrics({"loss": 1.5}, step=3)
    tracker.close(SUMMARY)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"phase": "dense", "step": 3, "loss": 1.5}


def test_a_service_that_fails_does_not_hurt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**settings: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(tmp_path, "offline", group="g", config={})
    tracker.log_metrics({"loss": 1.5}, step=0)
    tracker.close(SUMMARY)
    assert "no space left" in caplog.text
    assert (tmp_path / "metrics.jsonl").is_file()


def test_tensorboard_gets_the_metrics_and_the_point(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "tensorboard", group="g", config={})
    tracker.log_metrics({"loss": 1.5}, step=0)
    tracker.close(SUMMARY)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_wandb_offline_leaves_a_run_with_the_curves_point(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "offline", group="g", config={"strength": 3.0})
    tracker.log_metrics({"loss": 1.5}, step=0)
    tracker.close(SUMMARY)
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 0
