from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from vitrim.errors import ConfigError
from vitrim.jobs.status import STATUS_COPY
from vitrim.trainer.tracking import Tracker, Wandb, run_id

SUMMARY = {"strength": 3.0, "compact": {"top1": 97.0, "macs": 10}}


def test_metrics_are_on_disk_whatever_the_service(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "none", group="g", config={})
    tracker.phase = "dense"
    tracker.log_metrics({"loss": 1.5}, step=3)
    tracker.close(SUMMARY)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"phase": "dense", "step": 3, "loss": 1.5}


def test_steps_grow_over_the_phases_and_are_the_same_after_a_resume(tmp_path: Path) -> None:
    for phases in ((("dense", (0, 9)), ("score", (4,))), (("score", (9,)), ("classify", (0, 3)))):
        tracker = Tracker(tmp_path, "none", group="g", config={})
        for phase, steps in phases:
            tracker.phase = phase
            for step in steps:
                tracker.log_metrics({"loss": 1.5}, step=step)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [
        *(("dense", 0), ("dense", 9), ("score", 14), ("score", 19)),
        *(("classify", 20), ("classify", 23)),
    ]


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


@pytest.mark.parametrize("error", [SystemExit(1), TimeoutError("no answer")])
def test_an_unreachable_service_is_given_up_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    asked = []

    def refuse(*, settings: wandb.Settings, **_: object) -> None:
        asked.append((sys.stdin.isatty(), sys.stdin.read(), settings.init_timeout))
        raise error

    monkeypatch.setattr(wandb, "init", refuse)
    terminal = sys.stdin
    Tracker(tmp_path, "online", group="g", config={}).close(SUMMARY)
    assert asked == [(False, "", 10.0)]
    assert sys.stdin is terminal


def test_a_full_disk_costs_lines_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    tracker = Tracker(tmp_path, "none", group="g", config={})
    for step in range(3):
        tracker.log_metrics({"loss": 1.5}, step=step)
    assert caplog.text.count("No space left on device") == 1
    path.unlink()
    path.write_text('{"half')
    for step in (3, 4):
        tracker.log_metrics({"loss": 1.5}, step=step)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()[1:]] == [3, 4]


def test_tensorboard_gets_the_metrics_and_the_point(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "tensorboard", group="g", config={})
    tracker.log_metrics({"loss": 1.5}, step=0)
    tracker.close(SUMMARY)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert {*tmp_path.iterdir()} == {events, tmp_path / "metrics.jsonl"}


def test_csv_files_have_the_metrics_of_a_run_and_of_the_one_that_resumes_it(tmp_path: Path) -> None:
    for step, loss in enumerate((1.5, 0.5)):
        tracker = Tracker(tmp_path, "csv", group="g", config={})
        tracker.phase = "dense"
        tracker.log_metrics({"loss": loss}, step=step)
    tracker.close(SUMMARY)
    first, second = (tmp_path / "csv" / f"version_{n}" / "metrics.csv" for n in (0, 1))
    assert first.read_text().splitlines() == ["dense/loss,step", "1.5,0"]
    header, *lines = second.read_text().splitlines()
    assert header.split(",")[-2:] == ["dense/loss", "step"]
    assert lines[0].endswith("0.5,1")
    assert "97.0" in lines[1]


@pytest.mark.filterwarnings("ignore")  # of what MLflow imports
def test_mlflow_has_one_run_for_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "series" / "s3-seed0"
    folder.mkdir(parents=True)
    for step, loss in enumerate((1.5, 0.5)):
        tracker = Tracker(folder, "mlflow", group="series", config={"method": {"l1": 1e-4}})
        tracker.phase = "dense"
        tracker.log_metrics({"loss": loss}, step=step)
    tracker.close(SUMMARY)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("series")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("s3-seed0", "FINISHED")
    assert run.data.params == {"method/l1": "0.0001"}
    values = client.get_metric_history(run.info.run_id, "dense/loss")
    assert [(value.step, value.value) for value in values] == [(0, 1.5), (1, 0.5)]
    assert run.data.metrics["curve/top1"] == SUMMARY["compact"]["top1"]


def test_wandb_offline_leaves_a_run_with_the_curves_point(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "offline", group="g", config={"strength": 3.0})
    tracker.log_metrics({"loss": 1.5}, step=0)
    tracker.close(SUMMARY)
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 0


def written(folder: Path) -> bytes:
    """Return what W&B's offline runs in a folder contain; texts are there as they are."""
    return b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb"))


def test_a_run_of_wandb_is_where_conf_and_its_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"PROJECT": "unused", "RUN_GROUP": "cells"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    chosen = Wandb(project="pruned", job_type="compress", notes="a first try", tags=["tagged"])
    (tmp_path / "plan.json").write_text("{}")
    ids = set()
    for _ in range(2):  # as after a stop
        tracker = Tracker(tmp_path, "offline", group="series", config={}, wandb=chosen)
        tracker.phase = "dense"
        tracker.log_metrics({"loss": 1.5}, step=0)
        tracker.close(SUMMARY)
        folders = (tmp_path / "wandb").glob("offline-run-*")  # -TIME-ID, and -1 in the same second
        ids |= {path.name.split("-")[3] for path in folders}
    assert len(ids) == 1
    content = written(tmp_path)
    for word in ("pruned", "cells", "compress", "a first try", "tagged", "dense/step"):
        assert word.encode() in content, word
    assert b"unused" not in content
    assert b"plan.json" in content
    assert b"model.safetensors" not in content


def test_an_agent_of_wandb_chooses_the_id_except_for_jobs_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run_id(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert run_id(tmp_path) == "abc"
    monkeypatch.setenv(STATUS_COPY, str(tmp_path / "status.json"))
    assert run_id(tmp_path) == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tags": "a"}, "wandb.tags=a: expected a list"), ({"project": 3}, "wandb.project=3")],
)
def test_settings_of_wandb_that_are_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Wandb(**changes)
