"""The launcher of local sweeps: its jobs are processes, several at a time where there are GPUs.

The task function returns a `Work` for each job. It is done here, on a GPU of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import cast

from hydra.core.plugins import Plugins
from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from vitrim.errors import ConfigError, is_count, shown
from vitrim.jobs import forked
from vitrim.jobs.sweep import Place

_log = logging.getLogger(__name__)
Work = Callable[[Place], object]
"""One job of a sweep."""


BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
"""Hydra's own launcher, in whose place this one is: Hydra takes plugins from its packages only."""


def register() -> None:
    """Let Hydra use the launcher as its basic one."""
    Plugins.instance().class_name_to_class[BASIC] = LocalLauncher


class LocalLauncher(Launcher):
    """Does the jobs of a sweep, as many at a time as `places` says."""

    def __init__(self) -> None:
        self.config = OmegaConf.create()
        self.context: HydraContext | None = None
        self.task: TaskFunction | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra knows of the sweep."""
        self.config, self.context, self.task = config, hydra_context, task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Return what became of every job, in the order of the jobs.

        What prevents one job from starting is its result; the others are done.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = [
            self._prepared(overrides, index)
            for index, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        free = places(self.config, len(jobs))
        if len(free) == 1:
            for job in jobs:
                _finish(job, free[0])
            return jobs
        how = ", as forks" if free[0].forked else ""
        _log.info("%d jobs, %d at a time%s", len(jobs), len(free), how)
        queue: SimpleQueue[Place] = SimpleQueue()
        for place in free:
            queue.put(place)

        def work(job: JobReturn) -> None:
            place = queue.get()
            try:
                _finish(job, place)
            finally:
                queue.put(place)

        with ThreadPoolExecutor(len(free)) as pool:
            done: list[Future[None]] = [pool.submit(work, job) for job in jobs]
        for future in done:
            future.result()
        return jobs

    def _prepared(self, overrides: Sequence[str], index: int) -> JobReturn:
        """Return a job whose value is its `Work`, or the exception that prevents it."""
        assert self.context is not None
        assert self.task is not None
        _log.info("#%d: %s", index, " ".join(filter_overrides(overrides)))
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = index
        job = run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return job


def _finish(job: JobReturn, place: Place) -> None:
    """Do the work of a job; its result, or the exception that ended it, becomes its value."""
    if job.status is not JobStatus.COMPLETED:
        return
    try:
        job.return_value = cast(Work, job.return_value)(place)
    except Exception as error:
        job.return_value, job.status = error, JobStatus.FAILED


def places(config: DictConfig, jobs: int) -> list[Place]:
    """Return a place for every job that is done at a time, at least one.

    With `trainer.accelerator=gpu` there is one for each visible GPU, which the job alone sees;
    with `sweep.jobs`, that many, which share the GPUs. Where the jobs choose GPUs by themselves
    (a list in `trainer.devices`) there is one, unless `sweep.jobs` says more. Jobs of one process
    on the CPU are forks, where this process is the command `vitrim`.

    Raises:
        ConfigError: `sweep.jobs` is no number.
    """
    number = OmegaConf.select(config, "sweep.jobs")
    if number is not None and not is_count(number):
        raise ConfigError(f"sweep.jobs={shown(number)}: expected null or a whole number from 1 on")
    chosen = OmegaConf.select(config, "trainer.devices")
    on_gpu = OmegaConf.select(config, "trainer.accelerator") in ("gpu", "cuda")
    gpus = _visible_gpus() if on_gpu and not OmegaConf.is_list(chosen) else []
    n = min(number or len(gpus) or 1, jobs)
    words = ("progress=false",) if n > 1 else ()  # bars of several jobs would overwrite each other
    alone = OmegaConf.select(config, "trainer.accelerator") == "cpu" and chosen == 1
    if len(gpus) < 2:
        return [Place({}, words, forked=alone and jobs > 1 and forked.possible())] * n
    return [Place({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}, words) for i in range(n)]


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(index) for index in range(count)]
