"""Runs as jobs of a SLURM cluster: what `hydra/launcher=slurm` needs in addition to its yaml.

A job notes signals and saves like any run (`vitrim.jobs.signals`), then exits with 75 or 143; the
batch script in the yaml requeues it. The handlers of submitit and Lightning, which would requeue it
in the middle of a step, are replaced.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, MutableSequence, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from vitrim.errors import ConfigError
from vitrim.jobs import signals

_CHOICE = "hydra/launcher=slurm"
_GPUS = r"gpu:(?:[^:,(]+:)?(\d+)"
"""GPUs of a node, of each type, in what sinfo says of generic resources."""


def prepare(arguments: Sequence[str]) -> None:
    """Get ready to submit jobs and wait for them, if the command's arguments choose SLURM.

    Raises:
        ConfigError: it cannot work here: what is missing, and the way out.
    """
    if _CHOICE not in arguments:
        return
    way_out = f"leave {_CHOICE} out to run here"
    if not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        raise ConfigError(f"{_CHOICE} submits the jobs of a multirun: add -m")
    if find_spec("submitit") is None:
        raise ConfigError(f"{_CHOICE} needs more: pip install 'vitrim[slurm]', or {way_out}")
    missing = [tool for tool in ("sbatch", "srun") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"{_CHOICE} needs {' and '.join(missing)} on PATH: submit from a machine of the "
            f"cluster, or {way_out}"
        )
    for signum in signals.CODES:
        signal.signal(signum, _stop_waiting)


def _stop_waiting(signum: int, frame: FrameType | None) -> None:
    sys.stderr.write("vitrim: stopped waiting; submitted jobs continue\n")
    sys.exit(signals.CODES[signal.Signals(signum)])


def run_in_job(work: Callable[[], Path], *, wait_minutes: float | None) -> Path:
    """Return the result of `work`; exit with the code of a signal that asked it to stop.

    An exception would not do: Hydra and submitit take it for the job's result.

    Args:
        work: the run.
        wait_minutes: that it waits for what another job computes, before it gives its node back
            with exit code 75, to be requeued; None: it waits on.
    """
    from vitrim.jobs.distributed import ProcessError  # imports torch
    from vitrim.jobs.lock import limited_wait

    with signals.handled(), limited_wait(wait_minutes):
        try:
            return work()
        except signals.Preempted as error:
            sys.stderr.write(f"vitrim: {error}\n")
            sys.exit(error.code)
        except ProcessError as error:  # the batch script knows by what the other process ended
            sys.stderr.write(f"vitrim: {error}\n")
            sys.exit(1)


def tasks_per_node(accelerator: str, devices: object, partition: str | None) -> int:
    """Return how many processes a job has on each node: one for each device.

    Raises:
        ConfigError: `devices` is auto, and SLURM's nodes have no GPUs that it knows of.
    """
    from vitrim.jobs.distributed import requested_processes  # imports torch

    if gpus_per_node(accelerator, 1) is None or devices not in ("auto", -1, "-1"):
        plain = list(devices) if isinstance(devices, MutableSequence) else devices
        return requested_processes({"accelerator": accelerator, "devices": plain})
    place = [] if partition is None else [f"--partition={partition}"]
    told = _output("sinfo", "--noheader", "--format=%G", *place)
    numbers = [sum(map(int, re.findall(_GPUS, line))) for line in told.splitlines()]
    if not any(numbers):
        raise ConfigError(
            f"trainer.devices={devices}: sinfo names no GPUs of the nodes: set trainer.devices to "
            "the number of GPUs per node"
        )
    return min(number for number in numbers if number)


def _output(*command: str) -> str:
    """Return what a command writes, empty where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def gpus_per_node(accelerator: str, processes: int) -> int | None:
    """Return how many GPUs a job requests per node: one for each process of a GPU trainer."""
    return processes if accelerator in ("gpu", "cuda") else None


def submission_errors() -> tuple[type[Exception], ...]:
    """Return what is raised where sbatch refuses or a job dies; empty if none was submitted."""
    submitit = sys.modules.get("submitit.core.utils")
    return () if submitit is None else (submitit.UncompletedJobError,)
