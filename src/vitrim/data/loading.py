"""How batches are loaded: by how many processes, how far ahead, into which memory."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from vitrim.errors import ConfigError, is_count, shown


class LoadingSettings(TypedDict, total=False):
    """The keys of data.loading, with the fields of `Loading`."""

    prefetch_factor: int | None
    pin_memory: bool | str
    channels_last: bool
    decoder: str


DEFAULTS: LoadingSettings = {}
"""No settings: the defaults of `Loading`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How batches of image files are loaded.

    Args:
        workers: loading processes; "auto": as many as this process has cores.
        prefetch_factor: batches that each of them loads ahead; None: 2.
        pin_memory: whether batches lie in pinned memory, from where they are copied to a GPU while
            it computes; "auto": where there is one.
        channels_last: whether batches for training and evaluation have their channels last in
            memory, as convolutions on GPUs want them.
        decoder: of images to evaluate on, and of unlabelled ones: "pil", as timm prepares them, or
            "torchvision", which is faster and may differ by a level.

    Raises:
        ConfigError: a value that cannot be, or would be ignored.
    """

    workers: int | str
    prefetch_factor: int | None = None
    pin_memory: bool | str = "auto"
    channels_last: bool = False
    decoder: str = "pil"

    def __post_init__(self) -> None:
        ahead, pinned = self.prefetch_factor, self.pin_memory
        rules = {
            "workers": (
                self.workers in (0, "auto") or is_count(self.workers),
                "auto, or a whole number from 0 on",
            ),
            "loading.prefetch_factor": (
                ahead is None or (is_count(ahead) and self.workers != 0),
                "null, or with workers a whole number from 1 on",
            ),
            "loading.pin_memory": (
                pinned == "auto" or type(pinned) is bool,
                "auto, true or false",
            ),
            "loading.channels_last": (type(self.channels_last) is bool, "true or false"),
            "loading.decoder": (self.decoder in ("pil", "torchvision"), "pil or torchvision"),
        }
        problems = [
            f"data.{key}={shown(getattr(self, key.rpartition('.')[2]))}: expected {allowed}"
            for key, (valid, allowed) in rules.items()
            if not valid
        ]
        if pinned is True and not torch.cuda.is_available():
            problems.append(
                "data.loading.pin_memory=true: memory is pinned for a GPU, and there is none here; "
                "auto pins it where there is one"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def n_workers(self) -> int:
        """The number of loading processes."""
        return cores() if self.workers == "auto" else int(self.workers)

    def options(self, batches: int) -> dict[str, object]:
        """Return the options of a DataLoader of so many batches: it needs no more workers."""
        workers = min(self.n_workers, batches)
        pinned = torch.cuda.is_available() if self.pin_memory == "auto" else self.pin_memory
        ahead = {"prefetch_factor": self.prefetch_factor} if workers else {}
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": bool(pinned),
            **ahead,
        }


def cores() -> int:
    """Return how many cores this process has: its part of those that it shares with its siblings.

    SLURM says it; else they are the cores that the process may use (and no more than a limit of its
    control group), divided among the processes that torchrun started on this machine.
    """
    with suppress(KeyError, ValueError):
        return max(1, int(os.environ["SLURM_CPUS_PER_TASK"]))
    known = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    number = len(known) or os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        number = min(number, max(1, int(quota) // int(period)))
    with suppress(KeyError, ValueError, ZeroDivisionError):
        number //= int(os.environ["LOCAL_WORLD_SIZE"])
    return max(1, number)
