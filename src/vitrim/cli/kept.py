"""Whether trainings that keep their best weights have something to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrim.cli.checks import Config

if TYPE_CHECKING:
    from vitrim.pipeline import Job


def keep_problems(job: Job, cfg: Config) -> list[str]:
    """Return why the best weights of a training cannot be kept."""
    from vitrim.trainer.trainer_options import VALIDATION_EPOCHS, keeping_best, nothing_to_choose

    trainer = cfg["trainer"]
    every = trainer.get("check_val_every_n_epoch") or VALIDATION_EPOCHS
    trained = {"method": cfg["method"], **({} if job.model.trained else {"model": cfg["model"]})}
    problems = []
    for key, epochs in keeping_best(trained):
        if job.data is None:
            problems.append(f"{key}.keep=best: data=none has no images to choose by: set keep=last")
        elif every > epochs:
            problems.append(nothing_to_choose(key, every, epochs))
        elif trainer.get("val_check_interval", 1.0) != 1.0:
            problems.append(
                f"trainer.val_check_interval={trainer['val_check_interval']}: {key}.keep=best "
                "chooses among epochs: leave it out, or set keep=last"
            )
    return problems
