"""Lightning's own loggers that a run writes for: TensorBoard, CSV files and MLflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from vitrim.files import write

_RUN_ID = "mlflow_run"
"""File in a run's folder with the id of its run of MLflow, which a resumed run continues."""


def tensorboard(folder: Path, group: str, config: Mapping[str, object]) -> Logger:
    """Return what writes events into a run's folder."""
    return TensorBoardLogger(folder, name="", version="")


def csv(folder: Path, group: str, config: Mapping[str, object]) -> Logger:
    """Return what writes csv/version_0/metrics.csv in a run's folder; a resumed run version_1."""
    return CSVLogger(folder, name="csv", flush_logs_every_n_steps=1)


def mlflow(folder: Path, group: str, config: Mapping[str, object]) -> Logger:
    """Return what writes a run of MLflow, one for each run folder, in the experiment `group`.

    MLFLOW_TRACKING_URI says where; without it, mlflow.db beside the series of run folders.
    """
    known = folder / _RUN_ID
    out = folder.absolute().parents[1]
    logger = MLFlowLogger(
        experiment_name=group,
        run_name=folder.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out / 'mlflow.db'}",
        run_id=known.read_text() if known.is_file() else None,
    )
    run_id = str(logger.run_id)  # starts the run
    if not known.is_file():
        write(known, lambda path: path.write_text(run_id))
        logger.log_hyperparams(dict(config))
    return logger


LOGGERS: Mapping[str, Callable[[Path, str, Mapping[str, object]], Logger]] = {
    "tensorboard": tensorboard,
    "csv": csv,
    "mlflow": mlflow,
}
"""By the value of `tracking`: functions of a run's folder, its series and its recipe."""
