"""Sweeps as jobs of a cluster: a real SLURM of one node, and what is refused without one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import hydra
import pytest

import slurm as cluster
from command import QUICK, Command
from slurm import Slurm, wait
from vitrim.cli.compose import CONF
from vitrim.jobs import signals
from vitrim.jobs.slurm import gpus_per_node, run_in_job

VITRIM = str(Path(sys.executable).with_name("vitrim"))
SWEEP = (
    *("-m", "hydra/launcher=slurm", *QUICK, "model.training.epochs=100"),
    *("method.gating.epochs=1", "method.fine_tuning.epochs=1"),
)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    absent = cluster.missing()
    if absent:
        pytest.skip(f"needs slurm-wlm and munge: {', '.join(absent)} not installed")
    running = Slurm(tmp_path_factory.mktemp("slurm"), [])
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def swept(slurm: Slurm) -> Mapping[float, Path]:
    """Run folders of a sweep of two jobs, by strength."""
    out = slurm.folder / "swept"
    done = subprocess.run(
        [VITRIM, *SWEEP, "strength=0,3", f"out={out}"], env=slurm.env, check=False
    )
    assert done.returncode == 0
    reports = list(out.glob("vit*/*/report.json"))
    return {json.loads(path.read_text())["strength"]: path.parent for path in reports}


@pytest.mark.slurm
def test_a_sweep_is_one_array_of_jobs(slurm: Slurm, swept: Mapping[float, Path]) -> None:
    assert sorted(swept) == [0, 3]
    jobs = slurm.jobs("vitrim")
    assert sorted(job["ArrayTaskId"] for job in jobs) == ["0", "1"]
    assert {job["NumCPUs"] for job in jobs} == {"8"}
    assert {job["Requeue"] for job in jobs} == {"1"}


@pytest.mark.slurm
def test_a_job_interrupted_three_times_ends_bit_identical(
    slurm: Slurm, swept: Mapping[float, Path]
) -> None:
    out = slurm.folder / "interrupted"
    words = ("strength=3", "hydra.launcher.name=interrupted", f"out={out}")
    logged = ""
    with subprocess.Popen([VITRIM, *SWEEP, *words], env=slurm.env) as launcher:
        for number, interrupt in enumerate((_requeue, _preempt, _run_out_of_time), start=1):
            wait("training", lambda seen=logged: _metrics(out) != seen)
            interrupt(slurm, slurm.jobs("interrupted")[0]["JobId"])
            wait("a restart", lambda n=number: _restarts(slurm.jobs("interrupted")[0]) == n)
            logged = _metrics(out)
        assert launcher.wait(timeout=300) == 0
    lines = [json.loads(line) for line in _metrics(out).splitlines()]
    steps = [line["step"] for line in lines if line["phase"] == "dense" and "loss" in line]
    assert steps == sorted(set(steps))  # it resumed: nothing was done twice
    (report,) = out.glob("vit*/*/report.json")
    weights = "model.safetensors"
    assert (report.parent / weights).read_bytes() == (swept[3] / weights).read_bytes()


def _restarts(job: Mapping[str, str]) -> int | None:
    """Return how often a running job has been restarted."""
    return int(job["Restarts"]) if job["JobState"] == "RUNNING" else None


def _metrics(out: Path) -> str:
    return "".join(path.read_text() for path in out.glob("vit*/*/metrics.jsonl"))


def _requeue(slurm: Slurm, job: str) -> None:
    slurm.run("scontrol", "requeue", job)


def _preempt(slurm: Slurm, job: str) -> None:
    slurm.run("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=hostname")


def _run_out_of_time(slurm: Slurm, job: str) -> None:
    """Signal as SLURM does hydra.launcher.signal_delay_s before the end."""
    slurm.run("scancel", "--signal=USR2", job)


@pytest.mark.slurm
def test_what_is_requeued_and_how_often(slurm: Slurm, tmp_path: Path) -> None:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = ["hydra/launcher=slurm", "hydra.launcher.max_num_timeout=1"]
        setup = hydra.compose("run", words, return_hydra_config=True).hydra.launcher.setup
    setup = "\n".join([*setup, "trap : TERM"])  # a batch script that outlives scancel as well
    endings = {
        "saved": ("exit 75", 1),
        "signalled": ("kill -USR2 $$", 1),
        "terminated": ("kill -TERM $$", 1),
        "finished": ("exit 0", 0),
        "failed": ("exit 1", 0),
        "cancelled": (f'trap "exit 143" TERM; touch {tmp_path}/started; sleep 60 & wait', 0),
    }
    for name, (end, _) in endings.items():
        script = tmp_path / f"{name}.sh"
        script.write_text(f"#!/bin/bash\n{setup}\nsrun bash -c '{end}'\n")
        slurm.run("sbatch", "--requeue", f"--job-name={name}", "--output=/dev/null", str(script))
    wait("a job to cancel", (tmp_path / "started").exists)
    slurm.run("scancel", slurm.jobs("cancelled")[0]["JobId"])
    wait("an empty queue", lambda: not slurm.run("squeue", "--noheader"))
    assert {name: int(slurm.jobs(name)[0]["Restarts"]) for name in endings} == {
        name: restarts for name, (_, restarts) in endings.items()
    }


@pytest.mark.parametrize(
    ("words", "installed", "expected"),
    [
        ((), True, "add -m"),
        (("-m",), False, "pip install 'vitrim[slurm]'"),
        (("-m",), True, "sbatch and srun on PATH"),
    ],
)
def test_the_launcher_is_refused_where_it_cannot_work(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    installed: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setattr("vitrim.jobs.slurm.find_spec", lambda name: installed or None)
    done = command(*words, "hydra/launcher=slurm")
    assert done.code == 1
    assert expected in done.message
    assert not command.out.exists()


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with an `sbatch` that takes any job."""
    tools = tmp_path / "bin"
    tools.mkdir()
    _pretend(tools / "sbatch", "echo Submitted batch job 7")
    _pretend(tools / "srun", "exit 1")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tools


def _pretend(tool: Path, does: str) -> None:
    tool.write_text(f"#!/bin/sh\n{does}\n")
    tool.chmod(0o755)


def test_what_sbatch_refuses_is_reported_in_its_words(command: Command, pretended: Path) -> None:
    _pretend(pretended / "sbatch", "echo invalid partition specified >&2; exit 1")
    done = command("-m", "hydra/launcher=slurm")
    assert done.code == 1
    assert done.message.splitlines()[-1] == "vitrim: invalid partition specified"


def test_waiting_for_jobs_ends_at_once(command: Command, pretended: Path) -> None:
    _pretend(pretended / "sacct", "kill -INT $PPID; sleep 5")  # asked while it waits
    done = command("-m", "hydra/launcher=slurm")
    assert done.code == 143
    assert "submitted jobs continue" in done.message


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGUSR2, 75), (signal.SIGTERM, 143)])
def test_a_job_that_was_asked_to_stop_leaves_with_a_code(signum: int, code: int) -> None:
    def work() -> Path:
        signal.raise_signal(signum)
        signals.raise_if_stopped()
        return Path()

    with pytest.raises(SystemExit) as stopped:
        run_in_job(work)
    assert stopped.value.code == code


def test_a_gpu_is_asked_for_each_device_of_a_gpu_trainer() -> None:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = ["hydra/launcher=slurm", "trainer=gpu", "trainer.devices=2"]
        launcher = hydra.compose("run", words, return_hydra_config=True).hydra.launcher
    assert (launcher.gpus_per_node, launcher.tasks_per_node) == (2, 2)
    assert gpus_per_node("cpu", 2) is None
