"""Whether the trainer's options and this machine can carry a run to its end, checked before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vitrim.errors import ConfigError, shown

if TYPE_CHECKING:
    from lightning import Trainer
    from torch.utils.data import DataLoader

    from vitrim.pipeline import Job

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", 32)
"""Precisions in which weights stay in float32, as surgery, closed forms and latency need them."""
SMALL_WORK = 10**9
"""MACs of a batch below which more threads only wait for each other."""
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")


@contextmanager
def threads(number: int | None, job: Job, batch: int | None) -> Iterator[int]:
    """Compute with so many threads in this process; with as many as before at the end.

    Args:
        number: of threads; None: one on the CPU where a batch is little work (`SMALL_WORK`),
            otherwise as many as PyTorch has.
        job: its network is the work.
        batch: images in a batch; None: there are no images.
    """
    import torch

    before = torch.get_num_threads()
    chosen = number or (1 if _is_little_work(job, batch or 1) else before)
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)


def _is_little_work(job: Job, batch: int) -> bool:
    """Whether a batch of the dense network is so small that one thread is best."""
    from vitrim.budget.cost import shared_cost

    cost = shared_cost(job.model.shared_skeleton(), job.model.spec().size, job.latency_table)
    return cost.dense_count.macs * max(batch, job.latency.batch) < SMALL_WORK


def check_trainer(options: Mapping[str, object]) -> list[str]:
    """Return what is wrong with the precision and the strategy of a trainer, a sentence each."""
    precision, strategy = options.get("precision", "32-true"), options.get("strategy", "auto")
    wrong = []
    if precision not in PRECISIONS or isinstance(precision, bool):
        known = ", ".join(map(str, PRECISIONS[:3]))
        wrong.append(f"trainer.precision={shown(precision)}: expected one of {known}")
    named = isinstance(strategy, str)
    if named and not (strategy in STRATEGIES or str(strategy).startswith("fsdp")):
        wrong.append(
            f"trainer.strategy={shown(strategy)}: expected one of {', '.join(STRATEGIES[:2])}, "
            "fsdp: vitrim starts and joins the processes itself"
        )
    elif named and str(strategy).startswith("fsdp") and options.get("compile"):
        wrong.append(
            "trainer.compile=true: not with fsdp, which changes the modules: choose trainer=ddp, "
            "or set trainer.compile=false"
        )
    return wrong


def try_run(job: Job) -> list[str]:
    """Return what would fail after training, one sentence each: it is tried on a tiny input.

    The Trainer is made, the batches of an epoch are counted, and the int8 schemes are used once.
    """
    attempts = (_try_trainer, _try_batches, _try_quantize, _try_compile)
    problems = []
    for attempt in attempts:
        try:
            attempt(job)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def new_trainer(make: Callable[..., Trainer], **options: object) -> Trainer:
    """Return the Trainer that `make` makes of `options`, without files, logs and progress.

    Raises:
        ConfigError: what Lightning has against the options.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from vitrim.jobs import distributed
    from vitrim.trainer.phases import quiet_lightning

    quiet = {
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        "check_val_every_n_epoch": 1,
    }
    try:
        with quiet_lightning():
            trainer = make(plugins=[distributed.cluster_environment()], **{**quiet, **options})
    except (
        MisconfigurationException,
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        ImportError,
        AssertionError,
    ) as error:
        settings = getattr(make, "keywords", {})
        names = ("accelerator", "devices", "strategy", "precision")
        values = {name: shown(settings[name]) for name in names if name in settings}
        chosen = " ".join(f"trainer.{name}={value}" for name, value in values.items())
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{chosen}: the trainer cannot be made here ({reason}): trainer=cpu needs no GPU"
        ) from None
    return trainer


def _try_trainer(job: Job) -> None:
    if job.data is not None:
        new_trainer(job.trainer)


def _try_batches(job: Job) -> None:
    """Raise ConfigError if an epoch of training or of validation has no batch."""
    if job.data is None:
        return
    from vitrim.jobs.distributed import requested_processes

    settings = getattr(job.trainer, "keywords", {})
    processes = requested_processes(settings) * settings.get("num_nodes", 1)
    loaders = job.data.module(job.model.spec())
    kinds = [("limit_val_batches", "validation", loaders.val_dataloader)]
    if job.data.trainable:
        kinds.append(("limit_train_batches", "training", loaders.train_dataloader))
    problems = []
    for key, name, load in kinds:
        limit, batches = settings.get(key, 1.0), _batches(load(), processes, name == "training")
        if batches < 1:
            problems.append(
                f"trainer.devices: {processes} processes, and not every one has a {name} image: "
                "use fewer"
            )
        elif isinstance(limit, float) and int(batches * limit) < 1:
            problems.append(
                f"trainer.{key}={limit} of {batches} {name} batches is none: set 1.0 for all, a "
                "larger share, a number of batches (1), or a smaller data.batch_size"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _batches(loader: DataLoader[object], processes: int, shuffled: bool) -> int:
    """Return how many batches the process has that gets the fewest."""
    sampler = loader.batch_sampler
    images = len(loader.dataset)  # type: ignore[arg-type]
    size = getattr(sampler, "batch_size", None)
    if processes == 1 or not isinstance(size, int):
        return len(loader)
    own = images // processes
    return own // min(size, own // 2 * 2 or 1) if shuffled else math.ceil(own / size)


def check_device(device: object) -> list[str]:
    """Return what is wrong with the device that measures latency: it must be here, and compute."""
    import torch

    works = False
    if isinstance(device, str):
        with suppress(RuntimeError, AssertionError, ImportError):  # torch has all of them
            x = torch.ones(2, device=torch.device(device))
            works = x.device.type in ("cpu", "cuda") and float((x + x).sum()) == 4
    present = "cpu or cuda" if torch.cuda.is_available() else "cpu"
    wrong = f"latency.device={shown(device)}: expected a device of this machine, such as {present}"
    return [] if works else [wrong]


def _try_quantize(job: Job) -> None:
    """Raise ConfigError if a small layer cannot be quantised."""
    import torch

    from vitrim.network.int8_linear import to_int8

    for scheme in job.quantize:
        try:
            to_int8(torch.nn.Linear(16, 16), dynamic=scheme != "int8_weight_only")(
                torch.ones(2, 16)
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"quantize: {scheme} does not work here ({reason})") from None


def _try_compile(job: Job) -> None:
    """Raise ConfigError if a function cannot be compiled where the run trains."""
    if not job.compiles or job.data is None:
        return
    from vitrim.jobs.distributed import is_on_gpu
    from vitrim.trainer.compilation import check_compiles

    check_compiles("cuda" if is_on_gpu(getattr(job.trainer, "keywords", {})) else "cpu")
