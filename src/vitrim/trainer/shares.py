"""What a checkpoint holds of work that the processes of a run share out."""

from __future__ import annotations

from typing import TypeVar

from vitrim.errors import ConfigError
from vitrim.jobs import distributed

T = TypeVar("T")


def states_of_all(state: T, processes: int) -> T | list[T]:
    """Return the state of this process, or of several processes a list of theirs, by rank.

    Each process must call this; all but the main process, which writes, get an empty list.
    """
    return distributed.gathered(state) if processes > 1 else state


def own_state(saved: T | list[T], rank: int, processes: int) -> T | None:
    """Return this process's part of what `states_of_all` returned in the main process.

    None: that process did not exist. The runner of phases refuses another number of processes once
    training begins.

    Raises:
        ConfigError: there are several processes now, and those of the checkpoint did not share.
    """
    if isinstance(saved, list):
        return saved[rank] if rank < len(saved) else None
    if processes > 1:
        raise ConfigError(
            f"a checkpoint of work that was not shared out, and this run has {processes} "
            "processes, which share it: resume it with one process if it had one, or remove its "
            "folder `checkpoints` to start the phase over"
        )
    return saved
