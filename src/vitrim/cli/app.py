"""The command `vitrim`: from a network to a compact one and the report of what it cost.

    dense --scorer--> evidence --plan--> plan --cut--> compact --recovery--> measured, saved,
    reported

This is the only file that knows Hydra. torch is imported when a run starts, not before, so that
`vitrim --help` answers at once.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitrim.cli import checks
from vitrim.cli.compose import CONF, _build, _explain
from vitrim.cli.guard import _LOADS, _checked
from vitrim.cli.recipe import NOT_RECIPE, _recipe
from vitrim.errors import VitrimError
from vitrim.files import writable, write
from vitrim.jobs import signals, slurm, status, sweep

_log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", ".*version_base parameter is deprecated.*")  # Hydra 1.3 needs it
warnings.filterwarnings("ignore", r"[\s\S]*_execution_whitelist_")  # of 1.4: `checks` has a list
_register: Callable[..., None] = (  # omegaconf 2.4 gave the new function the old one's name
    OmegaConf.register_resolver
    if "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    else OmegaConf.register_new_resolver
)
_register("gpus", slurm.gpus, replace=True)  # of hydra/launcher/slurm.yaml


def run(cfg: DictConfig) -> Path:
    """Compress one network as `cfg` says; print and return the path of its report.json."""
    from vitrim.data import bad_images
    from vitrim.jobs import distributed
    from vitrim.jobs.lock import lock
    from vitrim.pipeline import _compress

    choices = _build(cfg)
    recipe = _recipe(cfg, choices["model"].fingerprint(), checks.identity(cfg.from_run))
    folder: Path = recipe["earlier"] or (
        Path(cfg.out).absolute() / recipe["series"] / recipe["name"]
    )
    report = folder / "report.json"
    with distributed.joined(recipe["resolved"]["trainer"]), lock(writable(folder)):
        first = distributed.first()
        if distributed.agreed(report.is_file()):
            _log.info("finished before; delete the folder to run it again")
            if first:
                status.tell(folder, "DONE")
        elif first:
            checks.same_recipe(folder / "recipe.yaml", recipe["resolved"], apart=NOT_RECIPE)
            text = OmegaConf.to_yaml(cfg, resolve=True)
            with status.told(folder), bad_images.listing(choices["data"], folder):
                write(folder / "recipe.yaml", lambda path: path.write_text(text))
                _compress(cfg, choices, recipe, folder)
        else:
            _compress(cfg, choices, recipe, folder)
    if first:
        sys.stdout.write(f"{report}\n")
        sys.stdout.flush()
    return report


def _mendable() -> tuple[type[Exception], ...]:
    """Return the errors whose message is all that a user needs."""
    return (VitrimError, HydraException, OmegaConfBaseException, OSError, *slurm.failures())


setattr(ConfigLoaderImpl, _LOADS, _checked(getattr(ConfigLoaderImpl, _LOADS)))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")
def _job(cfg: DictConfig) -> str:
    hydra_cfg = HydraConfig.get()
    submitted = "submitit" in hydra_cfg.launcher._target_
    if hydra_cfg.mode == RunMode.MULTIRUN and not submitted:
        checks.one_process(cfg.trainer)
        return sweep.job(_words(), out=Path(cfg.out).absolute(), minutes=cfg.sweep.minutes)
    return str(slurm.job(partial(run, cfg)) if submitted else run(cfg))


def _words() -> list[str]:
    """Return the command line of one job of a sweep."""
    cfg = HydraConfig.get()
    of_sweeps = ("hydra.mode", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
    kept = [word for word in cfg.overrides.hydra if not word.lstrip("+~").startswith(of_sweeps)]
    sources = [at for at in cfg.runtime.config_sources if at.provider == "command-line"]
    own = [word for at in sources for word in ("--config-dir", str(at.path))]
    return [*own, *kept, *cfg.overrides.task]


def main() -> None:
    """Run the command; what a user can mend ends in one message and exit code 1.

    A run that was told to stop ends with 143 or 75 (`vitrim.jobs.signals`).
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with signals.taken():
        try:
            slurm.prepare(sys.argv[1:])
            _job()
            signals.check()
        except signals.Preempted as error:
            sys.stderr.write(f"vitrim: {error}\n")
            sys.exit(error.code)
        except _mendable() as error:
            message = _explain(error, sys.argv[1:])
            status.refused(message)
            sys.exit(f"vitrim: {message}")
