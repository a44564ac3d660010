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
from typing import Any

import hydra
import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

import slurm as cluster
from command import QUICK, Command
from slurm import Slurm, wait
from vitrim.cli.compose import CONF
from vitrim.jobs import signals
from vitrim.jobs.distributed import ProcessError
from vitrim.jobs.lock import lock
from vitrim.jobs.slurm import gpus_per_node, run_in_job
from vitrim.jobs.status import LOCK

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
def test_an_array_of_jobs_of_two_processes_survives_a_kill(slurm: Slurm) -> None:
    words = (
        *("-m", "hydra/launcher=slurm", *QUICK, "trainer=ddp", "trainer.accelerator=cpu"),
        *("trainer.precision=32-true", "trainer.devices=2", "model.training.epochs=60"),
        *("method.gating.epochs=1", "method.fine_tuning.epochs=1", "checkpoint.minutes=0"),
        *("hydra.launcher.cpus_per_task=2", "strength=1,2,3"),
    )
    quiet, killed = slurm.folder / "two", slurm.folder / "killed"
    done = subprocess.run([VITRIM, *words, f"out={quiet}"], env=slurm.env, check=False)
    assert done.returncode == 0
    named = (*words, "hydra.launcher.name=two", f"out={killed}")
    with subprocess.Popen([VITRIM, *named], env=slurm.env) as launcher:
        wait(
            "a checkpoint",
            lambda: any(killed.glob("phases/dense-*/checkpoints/*/manifest.json")),
            seconds=900,
        )
        number = _of_the_lock(killed)
        os.kill(_rank(number, "1"), signal.SIGKILL)
        wait("a restart", lambda: _restarted(slurm, "two"), seconds=240)
        assert launcher.wait(timeout=500) == 0
    folders = [
        {path.parent.name: path.parent for path in out.glob("vit*/*/report.json")}
        for out in (quiet, killed)
    ]
    assert len(folders[0]) == 3
    assert folders[0].keys() == folders[1].keys()
    for name, folder in folders[0].items():
        weights = (folder / "model.safetensors").read_bytes()
        assert (folders[1][name] / "model.safetensors").read_bytes() == weights
    for out in (quiet, killed):  # what they share was done once
        lines = "".join(path.read_text() for path in out.glob("vit*/*/metrics.jsonl")).splitlines()
        entries = [json.loads(line) for line in lines]
        shared = ("dense", "score")
        steps = [(e["phase"], e["step"]) for e in entries if e["phase"] in shared and "loss" in e]
        assert len(steps) == len({*steps}) or out == killed


@pytest.mark.slurm
def test_a_job_that_waits_for_shared_phases_gives_its_node_back(slurm: Slurm) -> None:
    out = slurm.folder / "waiting"
    words = ("strength=1,3", "sweep.wait_minutes=0.02", "hydra.launcher.name=waiting")
    command = [VITRIM, *SWEEP, *words, f"out={out}"]
    done = subprocess.run(command, env=slurm.env, check=False, timeout=500)
    assert done.returncode == 0
    assert len([*out.glob("vit*/*/report.json")]) == 2
    restarts = [int(job["Restarts"]) for job in slurm.jobs("waiting")]
    assert 0 in restarts  # the one that trains the dense network
    assert max(restarts) >= 1
    assert max(restarts) < 20  # a requeued job does not come back at once
    lines = [json.loads(line) for line in _metrics(out).splitlines()]
    steps = [line["step"] for line in lines if line["phase"] == "dense" and "loss" in line]
    assert len(steps) == len({*steps}) > 0


def _of_the_lock(out: Path) -> str:
    """Return the number of the job that trains the dense network."""
    (lock_file,) = out.glob("phases/dense-*/.lock")
    holders = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    inode = str(lock_file.stat().st_ino)
    (pid,) = {line[-4] for line in holders if line[-3].endswith(f":{inode}") and "->" not in line}
    return _environment(int(pid))["SLURM_JOB_ID"]


def _rank(job: str, rank: str) -> int:
    """Return the process of a job that has this rank."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    found = [
        pid
        for pid in pids
        if (known := _environment(pid)).get("SLURM_JOB_ID") == job
        and known.get("SLURM_PROCID") == rank
        and b"submitit" in _command(pid)
    ]
    return min(found)


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in text.split("\0") if "=" in word)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _restarted(slurm: Slurm, name: str) -> bool:
    return any(int(job["Restarts"]) for job in slurm.jobs(name))


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
        "killed": ("kill -KILL $$", 3),
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
        run_in_job(work, wait_minutes=None)
    assert stopped.value.code == code


def test_a_job_that_waits_too_long_for_another_gives_its_node_back(tmp_path: Path) -> None:
    def work() -> Path:
        with lock(tmp_path):
            return tmp_path

    with FileLock(tmp_path / LOCK), pytest.raises(SystemExit) as ended:
        run_in_job(work, wait_minutes=0.001)
    assert ended.value.code == 75
    assert run_in_job(work, wait_minutes=0.001) == tmp_path


def test_a_job_that_loses_another_process_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Path:
        raise ProcessError("process 1 of 2 ended")

    with pytest.raises(SystemExit) as ended:
        run_in_job(work, wait_minutes=None)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "vitrim: process 1 of 2 ended\n"


def composed(*words: str) -> Any:
    """Return the settings of the launcher, resolved."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = ("hydra/launcher=slurm", *words)
        cfg = hydra.compose("run", [*words], return_hydra_config=True).hydra.launcher
    return OmegaConf.to_container(cfg, resolve=True)


def test_a_job_asks_for_a_gpu_cores_and_memory_for_each_process() -> None:
    of_two = composed("trainer=ddp", "trainer.devices=2")
    of_list = composed("trainer=ddp", "trainer.devices=[0,3]")
    on_cpu = composed("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert [each["tasks_per_node"] for each in (of_two, of_list, on_cpu)] == [2, 2, 2]
    assert [each["gpus_per_node"] for each in (of_two, of_list, on_cpu)] == [2, 2, None]
    assert (of_two["cpus_per_task"], of_two["mem_per_cpu"], of_two["mem_gb"]) == (8, "4GB", None)
    assert composed("trainer=ddp", "+trainer.num_nodes=2", "trainer.devices=4")["nodes"] == 2
    assert gpus_per_node("cpu", 2) is None


def test_automatic_devices_are_the_gpus_of_the_nodes(pretended: Path) -> None:
    told = ["(null)", "gpu:a100:8(S:0-1)", "gpu:4,shard:2", "gpu:v100:2,gpu:a100:6"]
    _pretend(pretended / "sinfo", "\n".join(f"echo '{line}'" for line in told))
    assert composed("trainer=ddp")["tasks_per_node"] == 4
    of_partition = 'case "$*" in *partition=big*) echo gpu:8;; esac'
    _pretend(pretended / "sinfo", of_partition)
    assert composed("trainer=ddp", "hydra.launcher.partition=big")["gpus_per_node"] == 8
    with pytest.raises(InterpolationResolutionError, match=r"trainer.devices=auto: sinfo names no"):
        composed("trainer=ddp")
    assert composed("trainer=ddp", "trainer.accelerator=cpu")["tasks_per_node"] == 1
