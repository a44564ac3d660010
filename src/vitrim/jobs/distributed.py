"""One run in several processes: how they start and join, and what the main process decides.

Under torchrun or SLURM the processes exist already; otherwise the first process starts the others
with the same command. All of them execute the whole run: the main process holds the locks, decides
what is finished already, and writes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities import move_data_to_device

from vitrim.errors import ConfigError, VitrimError, shown
from vitrim.jobs import signals
from vitrim.jobs.watch import watched

T = TypeVar("T")
PATIENCE = "VITRIM_PROCESS_MINUTES"
"""Environment variable: minutes that a process waits for the others of its run, in one call."""
_MINUTES, _MAX_MINUTES = 1440, 10**6  # a day: latency and files are the main process's work alone
_GRACE_S = 60
_CONNECT = timedelta(seconds=5)  # of one attempt


class ProcessError(VitrimError):
    """One of several processes of a run that ended early, or that the others cannot reach."""


def requested_processes(trainer: Mapping[str, object]) -> int:
    """Return how many processes on this machine a trainer's options request, at least 1.

    Raises:
        ConfigError: `devices` is no number from 1 on, no list of devices, and not auto.
    """
    devices = trainer.get("devices", 1)
    if isinstance(devices, list | tuple) and devices:
        return len(devices)
    if devices in ("auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1) if is_on_gpu(trainer) else 1
    if isinstance(devices, int | str) and not isinstance(devices, bool):
        with suppress(ValueError):
            number = int(devices)
            if number > 0:
                return number
    raise ConfigError(
        f"trainer.devices={shown(devices)}: expected a number from 1 on, a list of devices, or auto"
    )


def check_processes(trainer: Mapping[str, object]) -> None:
    """Refuse more processes than this machine has room for, where this command would start them.

    There may be one for each core (and two on a machine of one core), or one for each GPU.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    processes, nodes = requested_processes(trainer), trainer.get("num_nodes", 1)
    if processes < 1:
        raise ConfigError(
            f"trainer.devices={trainer.get('devices')}: expected a number from 1 on, or auto"
        )
    if not isinstance(cluster_environment(), LightningEnvironment):
        return  # torchrun or SLURM has started them
    if nodes != 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes}: this command starts processes on this machine only: run "
            "it under torchrun or with hydra/launcher=slurm, or set trainer.num_nodes=1"
        )
    on_gpu = is_on_gpu(trainer)
    limit = torch.cuda.device_count() if on_gpu else max(cores(), 2)
    if processes > max(limit, 1):
        raise ConfigError(
            f"trainer.devices={trainer.get('devices')}: this machine has {limit} "
            f"{'GPUs' if on_gpu else 'cores for processes'}: set trainer.devices={max(limit, 1)} "
            "or fewer"
        )


def check_workers(workers: object) -> None:
    """Refuse more loading processes than four for each core, and than 16.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    limit = max(4 * cores(), 16)
    if isinstance(workers, int) and workers > limit:
        raise ConfigError(
            f"data.workers={workers}: expected at most {limit}, four for each core of this machine"
        )


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_on_gpu(trainer: Mapping[str, object]) -> bool:
    """Whether a trainer's options request GPUs of CUDA."""
    accelerator = trainer.get("accelerator", "auto")
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def is_main_process() -> bool:
    """Whether this process is the only one, or the one that decides and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def place() -> tuple[int, int]:
    """Return the rank of this process, and how many processes there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast(value: T | None, *, source: int = 0) -> T:
    """Return the value of process `source`, by default the main one; the others may pass None."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=source)
    return cast(T, values[0])


def summed(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of x over all processes, each of which must call this."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def sent(x: torch.Tensor | None, *, source: int, device: torch.device) -> torch.Tensor:
    """Return a copy of the tensor of process `source`, on `device`, in all processes.

    Each must call this; all but `source` may pass None.
    """
    if not dist.is_initialized():
        assert x is not None
        return x
    is_source = dist.get_rank() == source
    kind = broadcast((x.shape, x.dtype) if is_source and x is not None else None, source=source)
    received = torch.empty(kind[0], dtype=kind[1], device=device)
    if is_source and x is not None:
        received.copy_(x)
    if received.numel():
        dist.broadcast(received, src=source)
    return received


def gathered(value: T) -> list[T]:
    """Return the values of all processes, by rank, with their tensors on the CPU.

    Each process must call this; all but the main process get an empty list.
    """
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size() if is_main_process() else []
    dist.gather_object(move_data_to_device(value, torch.device("cpu")), values or None)
    return values


@contextmanager
def process_group(trainer: Mapping[str, object]) -> Iterator[None]:
    """Join the processes of a run, started here if nothing else has; alone, do nothing."""
    check_processes(trainer)
    processes = requested_processes(trainer)
    if processes * int(str(trainer.get("num_nodes", 1))) == 1:
        yield
        return
    children: list[subprocess.Popen[bytes]] = []
    environment = cluster_environment()
    if isinstance(environment, LightningEnvironment):
        children = _start(processes) if "LOCAL_RANK" not in os.environ else []
        environment.set_world_size(processes)
        environment.set_global_rank(int(os.environ["LOCAL_RANK"]))
    try:
        _join(environment, children)
        with watched(children, lambda: _lost(children, "one has ended")):
            yield
            dist.barrier()
    except RuntimeError as error:
        if not is_lost_message(error):
            raise
        raise ProcessError(_lost(children, str(error))) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for child in children:
            _end(child)


def _join(environment: ClusterEnvironment, children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Initialise the process group."""
    where, store = None, None
    if isinstance(environment, LightningEnvironment):
        store = _meet(environment, children)
    else:  # torchrun and srun end the others
        where = f"tcp://{environment.main_address}:{environment.main_port}"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        timeout=_patience(),
        init_method=where,
        store=store,
    )


def _meet(
    environment: ClusterEnvironment, children: Sequence[subprocess.Popen[bytes]]
) -> dist.Store:  # type: ignore[name-defined]
    """Return the store of the processes once all of them are there.

    Raises:
        ProcessError: a child ended before it came, or not all came in time.
        Preempted: this process was asked to stop, or its parent no longer exists.
    """
    patience = _patience()
    rank, size = environment.global_rank(), environment.world_size()
    store: dist.Store | None = None  # type: ignore[name-defined]
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        signals.raise_if_stopped()
        if any(child.poll() is not None for child in children):
            raise ProcessError(_lost(children, "one ended before it had joined"))
        try:
            store = store or dist.TCPStore(  # type: ignore[attr-defined]
                environment.main_address,
                environment.main_port,
                size,
                is_master=rank == 0,
                timeout=_CONNECT,
                wait_for_workers=False,
            )
            store.set(f"there-{rank}", "")
            if store.check([f"there-{each}" for each in range(size)]):
                store.set_timeout(patience)
                return store
        except RuntimeError as error:
            if rank == 0 or not is_lost_message(error):
                raise
            store = None  # the main process is not there yet
        if time.monotonic() > deadline:
            raise ProcessError(_lost(children, f"not all of {size} joined"))
        time.sleep(0.05)


def _patience() -> timedelta:
    """Return how long a process waits for the others, which may be stopped or busy, in one call.

    Raises:
        ConfigError: the environment variable has no number of minutes above 0.
    """
    text = os.environ.get(PATIENCE, str(_MINUTES))
    with suppress(ValueError):
        minutes = float(text)
        if 0 < minutes <= _MAX_MINUTES:
            return timedelta(minutes=minutes)
    raise ConfigError(
        f"{PATIENCE}={text}: expected a number of minutes above 0, up to {_MAX_MINUTES:,}"
    )


def is_lost_message(error: RuntimeError) -> bool:
    """Whether PyTorch reports that a message between processes did not get through."""
    words = ("gloo", "peer", "NCCL", "TCPStore")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _lost(children: Sequence[subprocess.Popen[bytes]], reason: str) -> str:
    """Return what became of the processes of a run that did not hear from each other."""
    first = reason.partition("\n")[0]
    ended = []
    for rank, child in enumerate(children, 1):
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(timeout=2)  # one that was killed is noticed at once
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            ended += [f"process {rank} of {len(children) + 1} ended ({how})"] if code else []
    what = "; ".join(ended) or f"the processes of this run lost each other ({first})"
    return f"{what}: run the same command to resume from the last checkpoint"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Wait for a process of the run; kill it if it does not end: it may be stopped."""
    try:
        child.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def cluster_environment() -> ClusterEnvironment:
    """Return what has started the processes: torchrun, SLURM's srun, or this command itself."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return SLURMEnvironment(auto_requeue=False)  # a signal only sets a flag
    return LightningEnvironment()


def _start(processes: int) -> list[subprocess.Popen[bytes]]:
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
