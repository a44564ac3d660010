"""Runs as jobs of a SLURM cluster: what `hydra/launcher=slurm` needs besides its yaml.

A job notes signals and saves like any run (`vitrim.jobs.signals`), then leaves with 75 or 143; its
batch script, in the yaml, puts it back into the queue. Handlers of submitit and Lightning, which
would do so in the midst of a step, are replaced.
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


def prepare(words: Sequence[str]) -> None:
    """Get ready to submit and wait, if the words of the command choose SLURM.

    Raises:
        ConfigError: it cannot work here: what is missing, and the way out.
    """
    if _CHOICE not in words:
        return
    without = f"leave {_CHOICE} out to run here"
    if not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(words):
        raise ConfigError(f"{_CHOICE} submits the jobs of a multirun: add -m")
    if find_spec("submitit") is None:
        raise ConfigError(f"{_CHOICE} needs more: pip install 'vitrim[slurm]', or {without}")
    missing = [tool for tool in ("sbatch", "srun") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"{_CHOICE} needs {' and '.join(missing)} on PATH: submit from a machine of the "
            f"cluster, or {without}"
        )
    for signum in signals.CODES:
        signal.signal(signum, _leave)


def _leave(signum: int, frame: FrameType | None) -> None:
    sys.stderr.write("vitrim: no longer waiting; jobs that were submitted go on\n")
    sys.exit(signals.CODES[signal.Signals(signum)])


def job(work: Callable[[], Path]) -> Path:
    """Return what `work` does; if it was told to stop, leave with an exit code that says so.

    An exception would not do: Hydra and submitit take it for the job's result.
    """
    with signals.taken():
        try:
            return work()
        except signals.Preempted as error:
            sys.stderr.write(f"vitrim: {error}\n")
            sys.exit(error.code)


def gpus(accelerator: str, devices: int) -> int | None:
    """Return how many GPUs a node must give: one for each device of a GPU trainer."""
    return devices if accelerator in ("gpu", "cuda") else None


def failures() -> tuple[type[Exception], ...]:
    """Return what is raised where sbatch refuses, or a job dies; nothing if none is submitted."""
    submitit = sys.modules.get("submitit.core.utils")
    return () if submitit is None else (submitit.UncompletedJobError,)
