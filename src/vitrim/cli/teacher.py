"""The teacher of a run: built from its keys, and checked against the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from omegaconf import DictConfig, OmegaConf

from vitrim.cli.checks import Config
from vitrim.cli.config_files import CONF
from vitrim.errors import ConfigError, VitrimError, shown
from vitrim.files import read_yaml

if TYPE_CHECKING:
    from vitrim.model.teacher import Teacher
    from vitrim.pipeline import Job


def teacher_of(cfg: DictConfig) -> Teacher | None:
    """Return the teacher that the fine-tuning learns from; None where none is named.

    Raises:
        ConfigError: what is wrong with its keys; without a name, those that are set.
    """
    from vitrim.model.teacher import Teacher  # imports torch

    values = cast(Config, OmegaConf.to_container(cfg.teacher, resolve=True))
    known = cast(Config, read_yaml(CONF / "teacher" / "none.yaml"))
    for key in values.keys() - known.keys():
        raise ConfigError(f"unknown key teacher.{key}: expected one of {', '.join(known)}")
    if values["name"] is not None:
        return Teacher(**values)
    for key, value in values.items():
        if value != known[key]:
            raise ConfigError(f"teacher.{key}={shown(value)}: no teacher: set teacher.name as well")
    return None


def problems_of(job: Job, choices: Mapping[str, str | None]) -> list[str]:
    """Return why the fine-tuning cannot learn from the teacher."""
    teacher = job.teacher
    if teacher is None:
        return []
    name, recipes = f"teacher.name={teacher.name}", job.labelled_training
    if job.data is None or not recipes or not recipes[-1].epochs:
        where = "data=none" if job.data is None else f"method={choices['method']}"
        return [f"{name}: {where} has no fine-tuning with labels here: leave the teacher out"]
    problems = []
    if teacher.n_classes != job.data.n_classes:
        problems.append(
            f"{name} has {teacher.n_classes} classes, data={choices['data']} has "
            f"{job.data.n_classes}: set teacher.checkpoint and teacher.num_classes="
            f"{job.data.n_classes}, or choose a teacher of these classes"
        )
    channels, images = teacher.spec().channels, job.model.spec().channels
    if channels != images:
        problems.append(
            f"{name} takes images of {channels} channels, the run's have {images}: choose another "
            f"teacher, or set +teacher.args.in_chans={images} with a checkpoint"
        )
    try:
        teacher.fingerprint()
    except VitrimError as error:
        problems.append(str(error))
    return problems
