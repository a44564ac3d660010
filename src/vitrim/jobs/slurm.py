"""Runs as jobs of a SLURM cluster: what `hydra/launcher=slurm` needs in addition to its yaml.

A job notes signals and saves like any run (`vitrim.jobs.signals`), then exits with 75 or 143; the
batch script in the yaml requeues it. The handlers of submitit and Lightning, which would requeue it
in the middle of a step, are replaced.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from vitrim.errors import ConfigError
from vitrim.jobs import signals

_CHOICE = "hydra/launcher=slurm"


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


def run_in_job(work: Callable[[], Path]) -> Path:
    """Return the result of `work`; exit with the code of a signal that asked it to stop.

    An exception would not do: Hydra and submitit take it for the job's result.
    """
    with signals.handled():
        try:
            return work()
        except signals.Preempted as error:
            sys.stderr.write(f"vitrim: {error}\n")
            sys.exit(error.code)


def gpus_per_node(accelerator: str, devices: int) -> int | None:
    """Return how many GPUs a job requests per node: one for each device of a GPU trainer."""
    return devices if accelerator in ("gpu", "cuda") else None


def submission_errors() -> tuple[type[Exception], ...]:
    """Return what is raised where sbatch refuses or a job dies; empty if none was submitted."""
    submitit = sys.modules.get("submitit.core.utils")
    return () if submitit is None else (submitit.UncompletedJobError,)
