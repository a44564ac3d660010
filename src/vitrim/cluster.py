"""Runs as jobs of a SLURM cluster: what `hydra/launcher=slurm` needs besides its yaml."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec

from vitrim.errors import ConfigError


def check(words: Sequence[str]) -> None:
    """Refuse `hydra/launcher=slurm` among the words of the command where it cannot work.

    Raises:
        ConfigError: what is missing, and the way out.
    """
    if "hydra/launcher=slurm" not in words:
        return
    without = "leave hydra/launcher=slurm out to run here"
    if not {"-m", "--multirun"} & set(words):
        raise ConfigError("hydra/launcher=slurm submits the jobs of a multirun: add -m")
    if find_spec("submitit") is None:
        raise ConfigError(
            "hydra/launcher=slurm needs hydra-submitit-launcher: pip install 'vitrim[slurm]', "
            f"or {without}"
        )
    missing = [tool for tool in ("sbatch", "srun") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"hydra/launcher=slurm needs {' and '.join(missing)} on PATH: "
            f"run it where jobs are submitted to SLURM, or {without}"
        )


def gpus(accelerator: str, devices: int) -> int | None:
    """Return how many GPUs a node must give: a device each, none for other accelerators."""
    return devices if accelerator in ("gpu", "cuda") else None
