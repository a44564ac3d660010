"""What people use of Hydra: sweepers, launchers, a mode in a file, folders, completion."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from command import QUICK, Command
from fresh import Popen
from vitrim.cli import results
from vitrim.cli.app import LOG
from vitrim.cli.compose import CONF
from vitrim.jobs import sweep

DRY = ("data=none", "method=oneshot", "strength=2", "latency.repeats=1", "tracking=none")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the command lines of the processes that a sweep starts, which are quick to start."""
    lines: list[list[str]] = []

    def start(command: list[str], **options: object) -> Popen:
        lines.append(command)
        return Popen(command, **options)

    monkeypatch.setattr("vitrim.jobs.sweep.subprocess", SimpleNamespace(Popen=start))
    return lines


def overlay(folder: Path, content: object) -> tuple[str, ...]:
    path = folder / "mine" / "experiment" / "tuned.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n" + yaml.safe_dump(content))
    return "--config-dir", str(folder / "mine"), "experiment=tuned"


SWEEP = {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"strength": "1,2"}}}}


def test_a_file_may_ask_for_a_sweep_whose_jobs_are_single_runs(
    command: Command, tmp_path: Path, started: list[list[str]]
) -> None:
    words = [word for word in DRY if not word.startswith("strength")]
    done = command(*overlay(tmp_path, SWEEP), *words)
    assert done.code == 0, done.message
    assert len(started) == 2  # and no job has started others: they would be in the records
    assert all("hydra.mode=RUN" in line for line in started)
    assert len([*command.out.rglob("sweeps/*.json")]) == 2
    reports = [json.loads(path.read_text()) for path in command.out.rglob("report.json")]
    assert sorted(report["strength"] for report in reports) == [1, 2]


@pytest.mark.parametrize(
    ("hydra", "expected"),
    [
        ({"mode": "EVAL"}, "hydra.mode=EVAL: expected RUN or MULTIRUN"),
        ({"sweeper": {"params": {"plugins": "[os]"}}}, "must not sweep over this key"),
        ({"sweeper": {"params": {"+plugins": "[os]"}}}, "must not sweep over this key"),
        ({"sweeper": {"params": {"hydra.job.chdir": "true"}}}, "must not sweep over this key"),
        ({"sweeper": {"params": {"out": "/elsewhere"}}}, "must not sweep over this key"),
        ({"sweeper": {"params": {"data.download": "true"}}}, "must not sweep over this key"),
        ({"sweeper": {"params": {"strength": [1, 2]}}}, "values separated by commas"),
        ({"sweeper": {"params": {"seed": "${oc.env:HOME}"}}}, "values separated by commas"),
        ({"sweeper": {"params": "strength"}}, "expected keys and values"),
        ({"sweeper": {"max_batch_size": 1}}, "a file must not set this"),
    ],
)
def test_a_file_may_set_no_more_of_a_sweep(
    command: Command, tmp_path: Path, started: list[list[str]], hydra: object, expected: str
) -> None:
    done = command(*overlay(tmp_path, {"hydra": hydra}), *DRY)
    assert done.code == 1
    assert expected in done.message
    assert started == []


def test_a_job_of_a_sweep_never_starts_a_sweep(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]
) -> None:
    monkeypatch.setenv(sweep.STATUS_COPY, str(tmp_path / "status.json"))
    done = command(*overlay(tmp_path, SWEEP), *DRY)
    assert done.code == 1
    assert "a job of a sweep cannot be a sweep" in done.message
    assert started == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("optimized_metric=compact.top3",), "expected compact.KEY, with one of top1, top5"),
        (("optimized_metric=accuracy",), "report.json has no such number; it has compact.top1"),
        (("optimized_metric=3",), "expected null or a key of report.json"),
        (("optimized_metric=compact.top1",), "data=none has no images"),
    ],
)
def test_a_metric_that_no_report_has_is_refused_before_work(
    command: Command, words: tuple[str, ...], expected: str
) -> None:
    done = command(*DRY, *words)
    assert done.code == 1
    assert expected in done.message
    assert not list(command.out.rglob("recipe.yaml"))


def test_known_metrics_are_numbers_of_a_report(command: Command) -> None:
    report = command(*QUICK, "method=oneshot", "method.sampling.images=16").report
    for part, names in results.KNOWN.items():
        for name in names:
            assert isinstance(results.result_of(report, f"{part}.{name}"), float)
    assert results.result_of(report, None) == str(report)
    with pytest.raises(ValueError, match="has no such number, but null"):
        results.result_of(report, "stages.classify.top1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what Optuna imports
def test_optuna_finds_the_strength_that_keeps_most(command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = command(
        *("-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=random"),
        *("hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1"),
        *("hydra.sweeper.direction=maximize", "optimized_metric=kept.macs"),
        *(word for word in DRY if not word.startswith("strength")),
        "strength=choice(0,5)",
    )
    assert done.code == 0, done.message
    best = yaml.safe_load((command.out / "optimization_results.yaml").read_text())
    reports = [json.loads(path.read_text()) for path in command.out.rglob("report.json")]
    assert best["best_value"] == max(report["kept"]["macs"] for report in reports)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hydra.sweeper.sampler._target_=os.system", "callables are not allowed here"),
        ("hydra.sweeper.custom_search_space=os.system", "must be null"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_optuna_calls_nothing_else(command: Command, word: str, expected: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = command("-m", "hydra/sweeper=optuna", *DRY, word)
    assert done.code == 1
    assert expected in done.message


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_launchers_print_the_reports(launcher: str, tmp_path: Path) -> None:
    import subprocess

    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ("-m", f"hydra/launcher={launcher}", f"out={tmp_path}/out", *DRY)
    done = subprocess.run(
        [sys.executable, "-m", "vitrim", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "out").rglob("report.json")
    assert str(report) in done.stdout.splitlines()


def test_a_run_may_work_in_its_folder(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*DRY, "out=here", "hydra.job.chdir=true")
    assert done.code == 0, done.message
    assert done.report.is_relative_to(tmp_path / "here")
    assert Path.cwd() == tmp_path
    assert command(*DRY, "out=here").report == done.report
    assert not (tmp_path / "here" / "here").exists()


def test_what_a_run_logs_is_in_its_folder(command: Command) -> None:
    done = command(*DRY, "strength=1")
    lines = (done.report.parent / LOG).read_text().splitlines()
    assert "method=oneshot" in lines[0]
    assert lines[-1].endswith("finished")


def test_messages_and_completion_list_experiments_as_they_are_typed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = CONF / "experiment"
    names = [path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")]
    done = command("experiment=no_such_thing", *DRY)
    assert done.code == 1
    listed = {line.strip() for line in done.message.splitlines()}
    assert {*names} <= listed
    line = "vitrim experiment=vtp/"
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    monkeypatch.setattr(sys, "argv", ["vitrim", "--shell-completion", "query=bash"])
    from vitrim.cli.app import main

    main()
    offered = command.capture.readouterr().out.split()
    assert {f"experiment={name}" for name in names if name.startswith("vtp/")} == {*offered}


def test_callbacks_of_lightning_watch_every_phase(command: Command) -> None:
    words = (*QUICK, "method=oneshot", "method.sampling.images=16")
    plain = command(*words).report
    monitor = "{_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    watched = command(*words, f"+trainer.callbacks=[{monitor}]", f"out={command.out}/watched")
    assert watched.code == 0, watched.message
    assert watched.report.parent.name == plain.parent.name
    metrics = (watched.report.parent / "metrics.jsonl").read_text()
    assert "lr-AdamW" in metrics
