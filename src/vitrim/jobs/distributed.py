"""One run in several processes: who is there, who writes, and what the first one has decided.

Under torchrun or SLURM the processes are there already; otherwise the one that was started begins
the others, by the same command. All of them go through the whole run: the first holds the locks,
decides what is finished already, and writes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from vitrim.errors import ConfigError
from vitrim.jobs import signals


def wanted(trainer: Mapping[str, Any]) -> int:
    """Return how many processes of this machine a trainer's options ask for."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        on_gpu = trainer.get("accelerator") in ("gpu", "cuda") and torch.cuda.is_available()
        return torch.cuda.device_count() if on_gpu else 1
    try:
        return int(devices)
    except (TypeError, ValueError):
        raise ConfigError(f"trainer.devices={devices}: expected a number, a list or auto") from None


def first() -> bool:
    """Whether this process is the only one, or the one that decides and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agreed(value: Any) -> Any:
    """Return what the first process passes."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def joined(trainer: Mapping[str, Any]) -> Iterator[None]:
    """Join the processes of a run, begun here if nobody else did; alone, do nothing."""
    processes = wanted(trainer)
    if processes * int(trainer.get("num_nodes", 1)) == 1:
        yield
        return
    begun: list[subprocess.Popen[bytes]] = []
    at = environment()
    if isinstance(at, LightningEnvironment):
        begun = _begin(processes) if "LOCAL_RANK" not in os.environ else []
        at.set_world_size(processes)
        at.set_global_rank(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{at.main_address}:{at.main_port}",
        rank=at.global_rank(),
        world_size=at.world_size(),
    )
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
        for child in begun:
            child.wait()


def environment() -> ClusterEnvironment:
    """Return what has begun the processes: torchrun, SLURM's srun, or this command itself."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return SLURMEnvironment(auto_requeue=False)  # a signal sets a flag and no more
    return LightningEnvironment()


def _begin(processes: int) -> list[subprocess.Popen[bytes]]:
    """Start this command again for every further process of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "vitrim", *sys.argv[1:]],
            env={**os.environ, "LOCAL_RANK": str(rank), signals.PARENT: str(os.getpid())},
            start_new_session=True,
        )
        for rank in range(1, processes)
    ]
