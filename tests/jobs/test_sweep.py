"""Jobs of a sweep: the outcome of each is recorded, and a request to stop is passed on."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from command import QUICK
from fresh import Popen
from vitrim.jobs import signals, status
from vitrim.jobs.lock import lock
from vitrim.jobs.signals import Preempted
from vitrim.jobs.sweep import JobError, run_job

RUN = (*QUICK, "strength=3", "method.gating.epochs=1", "method.fine_tuning.epochs=1")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    with signals.handled():
        yield


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs be processes in which torch is imported already."""
    monkeypatch.setattr("vitrim.jobs.sweep.subprocess", SimpleNamespace(Popen=Popen))


def recorded(out: Path) -> dict[str, str]:
    (path,) = (out / "sweeps").glob("*.json")
    record: dict[str, str] = json.loads(path.read_text())
    return record


def test_a_job_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"not finished after 0.02 minutes"):
        run_job([*RUN, f"out={tmp_path}"], out=tmp_path, minutes=0.02)
    assert recorded(tmp_path)["status"] == "FAILED"


def test_why_a_job_failed_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="unknown key strong"):
        run_job([*RUN, "strong=9", f"out={tmp_path}"], out=tmp_path, minutes=None)
    assert recorded(tmp_path)["status"] == "FAILED"


@pytest.mark.usefixtures("quick_start")
def test_a_request_to_stop_reaches_the_job(tmp_path: Path) -> None:
    def stop() -> None:
        while not [*tmp_path.glob("*/*/status.json")]:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGUSR1)

    threading.Thread(target=stop, daemon=True).start()
    words = [*RUN, "model.training.epochs=500", "trainer.limit_train_batches=1.0"]
    with pytest.raises(Preempted, match="SIGUSR1") as caught:
        run_job([*words, f"out={tmp_path}"], out=tmp_path, minutes=None)
    assert caught.value.code == 75
    assert recorded(tmp_path)["status"] == "PREEMPTED"
    (file,) = tmp_path.glob("*/*/status.json")
    assert status.read_status(file)["status"] == "PREEMPTED"


def test_a_status_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")
    assert status.read_status(tmp_path / "status.json") == {}
    assert status.read_status(tmp_path / "missing.json") == {}


def test_the_report_names_what_is_missing(tmp_path: Path) -> None:
    killed, failed, fresh = (tmp_path / "series" / name for name in ("a", "b", "c"))
    for folder in (killed, failed, fresh):
        folder.mkdir(parents=True)
    status.write_status(killed, "RUNNING")
    status.write_status(failed, "FAILED", "MemoryError: 3 GiB")
    (tmp_path / "sweeps").mkdir()
    status.write_json(
        tmp_path / "sweeps" / "1.json",
        {"job": ["strength=9"], "status": "FAILED", "reason": "strength=9: expected 0 to 5"},
    )
    status.write_json(tmp_path / "sweeps" / "2.json", {"job": ["strength=1"], "status": "DONE"})
    lines = status.unfinished_lines([killed, failed, fresh], [tmp_path])
    assert [line.partition(": ")[2][:20] for line in lines] == [
        "killed: status.json ",
        "FAILED MemoryError: ",
        "unfinished",
        "FAILED strength=9: e",
    ]
    with lock(killed):
        assert status.unfinished_lines([killed], []) == [f"{killed}: RUNNING"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 100_000])
def test_a_status_of_another_kind_is_reported_as_one(tmp_path: Path, text: str) -> None:
    (tmp_path / status.STATUS).write_text(text)
    assert status.status_of(tmp_path) == ("unfinished", "status.json cannot be read")
    assert status.unfinished_lines([tmp_path], []) == [
        f"{tmp_path}: unfinished: status.json cannot be read"
    ]


@pytest.mark.usefixtures("quick_start")
def test_of_two_at_once_one_works_and_both_end_with_its_report(tmp_path: Path) -> None:
    words = [*RUN, f"out={tmp_path}"]
    with ThreadPoolExecutor(2) as pool:
        reports = [*pool.map(lambda _: run_job(words, out=tmp_path, minutes=None), range(2))]
    assert reports[0] == reports[1]
    report = Path(reports[0])
    assert report.is_file()
    assert recorded(tmp_path)["status"] == "DONE"
    assert status.read_status(report.parent / status.STATUS)["status"] == "DONE"
    lines = (report.parent / "metrics.jsonl").read_text().splitlines()
    steps = [(entry["phase"], entry["step"]) for entry in map(json.loads, lines)]
    assert len(steps) == len({*steps})  # nothing was done twice
