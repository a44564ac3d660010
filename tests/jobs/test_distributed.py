"""Runs of two processes: started by the command or by torchrun, counted once, refused in sweeps."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import vitrim
from command import EVERY_IMAGE, QUICK, Command
from fresh import python, together
from vitrim.data import ImageSpec
from vitrim.data.digits import Digits
from vitrim.errors import ConfigError
from vitrim.jobs import distributed
from vitrim.jobs.distributed import PATIENCE, requested_processes
from vitrim.jobs.lock import lock
from vitrim.jobs.status import LOCK

TWO = ("trainer.devices=2", "trainer.strategy=ddp", "strength=3")


def ran(*command: str) -> Path:
    done = python(*command, timeout=500, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.endswith("report.json")]
    return Path(line)


def of_torchrun(processes: int) -> list[dict[str, str]]:
    """Return what `torchrun --nproc-per-node` sets in the environment of each process."""
    alike = {
        "TORCHELASTIC_RUN_ID": "tests",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [{**alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def in_two_processes(script: str, *, timeout: float = 500) -> None:
    """Run a script, which imports modules of tests/trainer, in two processes as torchrun would.

    They are killed after so many seconds.
    """
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests / "trainer"), str(Path(vitrim.__file__).parents[1])]
    env = [
        {**of_rank, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"}
        for of_rank in of_torchrun(2)
    ]
    done = together([("-c", script)] * 2, env=env, timeout=timeout)
    assert [each.returncode for each in done] == [0, 0], "\n".join(each.stderr for each in done)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def accuracy_of(folder: Path) -> float:
    """Return the top-1 of a saved network over every held-out digit, without a trainer."""
    recipe: Any = vitrim.load(folder)
    net, _ = recipe
    digits = Digits(batch_size=360, held_out=0.2, shift=0.0, rotation=0.0, label_smoothing=0.0)
    spec = ImageSpec(
        channels=1, size=(8, 8), mean=(0.5,), std=(0.5,), interpolation="bicubic", crop_pct=1.0
    )
    (batch,) = digits.module(spec).val_dataloader()
    with torch.no_grad():
        return 100 * float((net(batch[0]).argmax(1) == batch[1]).double().mean())


def test_two_processes_of_one_command_count_every_image_once(tmp_path: Path) -> None:
    report = ran(
        "-m", "vitrim", *QUICK, EVERY_IMAGE, *TWO, "method.gating.epochs=1",
        "method.fine_tuning.epochs=1", f"out={tmp_path}",
    )  # fmt: skip
    content = json.loads(report.read_text())
    assert content["compact"]["top1"] == pytest.approx(accuracy_of(report.parent), abs=1e-4)
    assert json.loads((report.parent / "status.json").read_text())["status"] == "DONE"


def test_under_torchrun_statistics_are_those_of_one_process(
    tmp_path: Path, command: Command
) -> None:
    start = command(*QUICK, "strength=0").report.parent
    words = (*QUICK, f"model.checkpoint={start}", "method=oneshot", "target.macs=0.7")
    alone = command(*words).report.parent
    more = ("trainer.devices=2", "trainer.strategy=ddp", f"out={tmp_path / 'two'}")
    two = together([("-m", "vitrim", *words, *more)] * 2, env=of_torchrun(2), timeout=500)
    assert [done.returncode for done in two] == [0, 0], two[0].stderr
    (report,) = tmp_path.glob("two/*/*/report.json")
    assert two[0].stdout.splitlines()[-1] == str(report)
    both = report.parent
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (alone, both)]
    assert plans[0]["edits"] == plans[1]["edits"]
    one, two = ((folder / "model.safetensors").read_bytes() for folder in (alone, both))
    assert one == two


@pytest.mark.slow
def test_torchrun_itself_starts_a_run(tmp_path: Path) -> None:
    report = ran(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "vitrim", *QUICK, *TWO, "method=oneshot", f"out={tmp_path}",
    )  # fmt: skip
    assert json.loads((report.parent / "status.json").read_text())["status"] == "DONE"


def test_sweeps_of_jobs_of_several_processes_are_refused(command: Command) -> None:
    done = command("-m", *QUICK, *TWO)
    assert done.code == 1
    for way in ("without -m", "torchrun", "hydra/launcher=slurm"):
        assert way in done.message


@pytest.mark.parametrize(
    ("trainer", "processes"),
    [
        ({}, 1),
        ({"devices": 3}, 3),
        ({"devices": [0, 2]}, 2),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({"devices": "2"}, 2),
    ],
)
def test_how_many_processes_a_trainer_asks_for(trainer: dict[str, Any], processes: int) -> None:
    assert requested_processes(trainer) == processes


def test_devices_that_are_no_number_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.devices=many"):
        requested_processes({"devices": "many"})


@contextmanager
def forked(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], object]) -> Iterator[list[Any]]:
    """Run `work` in two joined processes; at the end expect that both return within a minute."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))

    def joined(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        with distributed.process_group({"devices": 2}):
            work(rank)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=joined, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    try:
        yield ranks
        for rank in ranks:
            rank.join(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()


def test_a_wait_for_another_run_may_be_longer_than_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATIENCE, "0.06")  # 3.6 seconds

    def work(rank: int) -> None:
        with lock(tmp_path):
            (tmp_path / f"done-{rank}").touch()

    other = FileLock(tmp_path / LOCK)
    other.acquire()
    with forked(monkeypatch, work) as ranks:
        time.sleep(5)
        assert not list(tmp_path.glob("done-*"))
        assert all(rank.is_alive() for rank in ranks)
        other.release()
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_a_process_that_is_stopped_for_a_while_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            (tmp_path / "ready").touch()
            time.sleep(0.2)
        assert distributed.broadcast("plan" if rank == 0 else None) == "plan"

    with forked(monkeypatch, work) as ranks:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        time.sleep(1)
        assert ranks[0].is_alive()
        os.kill(ranks[1].pid, signal.SIGCONT)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_a_process_that_is_killed_ends_the_others_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.broadcast("plan")
        torch.distributed.barrier()

    def noted(rank: int) -> None:
        try:
            work(rank)
        except RuntimeError as error:
            if distributed.is_lost_message(error):
                (tmp_path / "noted").touch()
            raise

    with forked(monkeypatch, noted) as ranks:
        pass
    assert [rank.exitcode for rank in ranks] == [1, -signal.SIGKILL]
    assert (tmp_path / "noted").exists()


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_killed_before_it_joins_ends_the_others(killed: int) -> None:
    """A process that this one has started is killed, or this one while the other waits for it."""
    words = [sys.executable, "-c", START, str(killed), str(free_port())]
    parent = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        _, message = parent.communicate(timeout=100)
    finally:
        parent.kill()
    assert parent.returncode == (-signal.SIGKILL if killed == 0 else 1)
    assert killed == 0 or b"process 1 of 2 ended (killed by SIGKILL)" in message


START = """
import os, signal, subprocess, sys, time
from vitrim.jobs import distributed, signals

CHILD = '''
from vitrim.jobs import distributed
with distributed.process_group({"devices": 2}):
    pass
'''

def start(processes):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], LOCAL_RANK="0")
    env = {**os.environ, "LOCAL_RANK": "1", signals.PARENT: str(os.getpid())}
    child = subprocess.Popen([sys.executable, "-c", CHILD], env=env)
    if killed == 1:
        child.kill()
    else:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return [child]

killed = int(sys.argv[1])
distributed._start = start
with distributed.process_group({"devices": 2}):
    pass
"""
"""Starts a second process as a run does; kills it, or itself, before they have joined."""


@pytest.mark.parametrize("minutes", ["x", "0", "-1", "nan", "inf", ""])
def test_a_patience_that_is_no_time_is_refused(
    monkeypatch: pytest.MonkeyPatch, minutes: str
) -> None:
    monkeypatch.setenv(PATIENCE, minutes)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with (
        pytest.raises(ConfigError, match=f"{PATIENCE}={minutes}: expected"),
        distributed.process_group({"devices": 2}),
    ):
        pass


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_process_is_killed_is_resumed_by_the_same_command(
    tmp_path: Path, rank: int
) -> None:
    words = (
        "-m", "vitrim", *QUICK, *TWO, "model.training.epochs=30", "checkpoint.minutes=0",
        "method.gating.epochs=1", "method.fine_tuning.epochs=1", f"out={tmp_path}",
    )  # fmt: skip
    first = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("phases/dense-*/checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (child,) = [pid for pid in children_of(first.pid) if b"vitrim" in cmdline(pid)]
    os.kill((first.pid, child)[rank], signal.SIGKILL)
    _, message = first.communicate(timeout=120)
    if rank == 1:
        assert first.returncode == 1
        assert "process 1 of 2 ended (killed by SIGKILL): run the same command" in message
        assert "Traceback" not in message
    assert ran(*words).is_file()


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.gpu
def test_a_network_that_is_shared_out_among_gpus_is_saved_whole(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    words = (*QUICK, EVERY_IMAGE, "trainer=fsdp", "strength=3")
    report = ran("-m", "vitrim", *words, f"out={tmp_path}")
    content = json.loads(report.read_text())
    assert content["compact"]["top1"] == pytest.approx(accuracy_of(report.parent), abs=1e-4)
