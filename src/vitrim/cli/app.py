"""The command `vitrim`: compress one network, or many in a multirun.

torch is imported when a run starts, not before, so that `vitrim --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitrim import __version__
from vitrim.cli import checks, experiments, guard, launcher, results
from vitrim.cli.arguments import prepared, show_every_character, use_utf8
from vitrim.cli.compose import build_job, check_groups, explain, register_resolvers
from vitrim.cli.config_files import CONF
from vitrim.cli.help import help_text
from vitrim.cli.start import uncollected
from vitrim.errors import ConfigError, VitrimError, shortened
from vitrim.files import escape, writable, write
from vitrim.jobs import signals, slurm, status, sweep

if TYPE_CHECKING:
    from vitrim.cli.recipe import Contents
    from vitrim.pipeline import Identity, Job

_log = logging.getLogger(__name__)
LOG = "vitrim.log"
"""File in a run's folder with what was logged."""
_UNFORESEEN = (
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError),
    *(AssertionError, MemoryError),
)
"""What values of a wrong kind raise in Lightning, timm and torch, where no check names them."""
experiments.install()
results.install()
guard.install()  # at import: SLURM's jobs import this module and compose before they call `_job`
register_resolvers()


def run(cfg: DictConfig) -> Path:
    """Compress one network as `cfg` says; print and return the path of its report.json."""
    with uncollected():
        from vitrim.cli.hardware import threads
        from vitrim.cli.opening import opening_lines
        from vitrim.cli.recipe import check_resumable
        from vitrim.data import bad_images
        from vitrim.jobs import distributed
        from vitrim.jobs.lock import lock
        from vitrim.pipeline import run as compress
        from vitrim.report.console import result_table

    job, contents, identity, folder = _set_up(cfg)
    report = folder / "report.json"
    with (
        threads(cfg.threads, job, cfg.data.get("batch_size")),
        distributed.process_group(cfg.trainer),
        lock(writable(folder)),
    ):
        first = distributed.is_main_process()
        if distributed.broadcast(report.is_file()):
            _log.info("finished before; delete the folder to run it again")
            if first:
                status.write_status(folder, "DONE")
        elif first:
            check_resumable(folder, dict(identity.recipe), contents)
            text = OmegaConf.to_yaml(cfg, resolve=True)
            with (
                status.recorded(folder),
                bad_images.recorded(job.data, folder),
                _logged(folder),
                _in(folder),
            ):
                write(folder / "recipe.yaml", lambda path: path.write_text(text))
                for line in opening_lines(job, identity):
                    _log.info("%s", line)
                sys.stdout.write(f"{result_table(compress(job, identity, folder))}\n")
        else:
            with _in(folder):
                compress(job, identity, folder)
    if first:
        sys.stdout.write(f"{report}\n")
        sys.stdout.flush()
    return report


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Append what is logged to a file in the run's folder as well, and the error that ends it."""
    handler = logging.FileHandler(folder / LOG, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    logging.getLogger().addHandler(handler)
    own = logging.getLogger("vitrim.run")  # for the file alone
    own.propagate, own.handlers = False, [handler]
    own.setLevel(logging.INFO)
    own.info("vitrim %s: %s", __version__, " ".join(HydraConfig.get().overrides.task))
    try:
        yield
        own.info("finished")
    except BaseException:
        own.exception("ended by an error")
        raise
    finally:
        own.handlers = []
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def _in(folder: Path) -> Iterator[None]:
    """Work in the run's folder if hydra.job.chdir is true, otherwise in that of the command."""
    before = Path.cwd()
    if HydraConfig.get().job.chdir:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _set_up(cfg: DictConfig) -> tuple[Job, Contents, Identity, Path]:
    """Return the job of a run, the contents of its paths, its identity and its folder.

    Raises:
        ConfigError: what is wrong with the choices; where no check says it, the choices.
    """
    from vitrim.cli.identity import contents_of, identity_of

    try:
        job = build_job(cfg)
        contents = contents_of(cfg, job)
        return job, contents, *identity_of(cfg, job, contents)
    except _user_errors():
        raise
    except _UNFORESEEN as error:
        _log.debug("this was raised:", exc_info=True)
        words = " ".join(HydraConfig.get().overrides.task)
        raise ConfigError(
            f"{words}: cannot be set up ({_named(error)}); hydra.verbose=true shows where"
        ) from error


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")
def _job(cfg: DictConfig) -> str | float | launcher.Work:
    hydra_cfg = HydraConfig.get()
    os.chdir(hydra_cfg.runtime.cwd)  # paths are those of the command; hydra.job.chdir acts later
    returned = partial(results.result_of, key=cfg.optimized_metric)
    submitted = "submitit" in hydra_cfg.launcher._target_
    if hydra_cfg.mode == RunMode.MULTIRUN and not submitted:
        sweep.refuse_nested()
        check_groups(cfg)
        checks.one_process(cfg.trainer)
        out = Path(cfg.out).absolute()
        work = partial(sweep.run_job, _job_arguments(), out=out, minutes=cfg.sweep.minutes)
        if hydra_cfg.launcher._target_ == launcher.BASIC:
            return lambda place: returned(work(place=place))
        return returned(work())
    if submitted:
        report = slurm.run_in_job(partial(run, cfg), wait_minutes=cfg.sweep.wait_minutes)
        return returned(report)
    try:
        return returned(run(cfg))
    except _user_errors() as error:
        _end(error)  # here, because Hydra would print all arguments before the message


def _job_arguments() -> list[str]:
    """Return the command line of one job of a sweep, which is a single run whatever yamls say."""
    cfg = HydraConfig.get()
    of_sweeps = ("hydra.mode", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
    kept = [word for word in cfg.overrides.hydra if not word.lstrip("+~").startswith(of_sweeps)]
    sources = [source for source in cfg.runtime.config_sources if source.provider == "command-line"]
    folders = [word for source in sources for word in ("--config-dir", str(source.path))]
    (main,) = (source.path for source in cfg.runtime.config_sources if source.provider == "main")
    folders += [] if Path(main) == CONF else ["--config-path", str(main)]
    folders += [] if cfg.job.config_name == "run" else ["--config-name", str(cfg.job.config_name)]
    return [*folders, *kept, "hydra.mode=RUN", *cfg.overrides.task]


def _user_errors() -> tuple[type[Exception], ...]:
    """Return the errors whose message is all that a user needs."""
    return (
        VitrimError,
        HydraException,
        OmegaConfBaseException,
        OSError,
        RecursionError,
        *slurm.submission_errors(),
    )


def _end(error: Exception) -> NoReturn:
    """End the process with the message of `error`, and the exit code of a request to stop."""
    if isinstance(error, signals.Preempted):
        sys.stderr.write(f"vitrim: {error}\n")
        sys.exit(error.code)
    message = shortened(explain(error, sys.argv[1:]))
    status.write_refusal(message)
    sys.exit(f"vitrim: {escape.lines(message)}")


def main() -> None:
    """Run the command; what a user can mend ends in one message and exit code 1.

    A run that was asked to stop ends with 143 or 75 (`vitrim.jobs.signals`).
    """
    if sys.argv[1:] in (["--help"], ["-h"]):
        sys.stdout.write(help_text(CONF))
        return
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"vitrim {__version__}\n")
        return
    use_utf8("vitrim.cli.app")
    show_every_character()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are
    with warnings.catch_warnings(), signals.handled():
        # Hydra 1.3 needs version_base, which 1.4 deprecates; 1.4 warns of lists that it lacks
        warnings.filterwarnings("ignore", ".*version_base parameter is deprecated.*")
        warnings.filterwarnings("ignore", r"[\s\S]*_execution_whitelist_")
        try:
            sys.argv[1:] = prepared(sys.argv[1:])
            slurm.prepare(sys.argv[1:])
            launcher.register()
            _job()
            signals.raise_if_stopped()
        except _user_errors() as error:
            _end(error)
        except Exception as error:
            if _is_of_job(error):
                raise
            words = " ".join(sys.argv[1:])
            _end(ConfigError(f"{words}: the configuration cannot be composed ({_named(error)})"))


def _is_of_job(error: Exception) -> bool:
    """Whether a run had begun; before that, Hydra only reads what the user wrote."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return any(frame.f_code is _job.__wrapped__.__code__ for frame in frames)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
