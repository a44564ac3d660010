"""The record of a run: JSON lines on disk first, then W&B or another logger, which may fail."""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vitrim.errors import require
from vitrim.files import digest
from vitrim.jobs.status import STATUS_COPY
from vitrim.trainer.loggers import LOGGERS

if TYPE_CHECKING:
    import wandb

_log = logging.getLogger(__name__)

_LIMITS: Mapping[str, Any] = {
    "init_timeout": 10.0,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
}
"""Seconds that an unreachable W&B may cost; older releases know only the first of them."""

_VARIABLES = {"project": "WANDB_PROJECT", "group": "WANDB_RUN_GROUP"}
Sink = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wandb:
    """Where W&B keeps a run; what is None or empty is as W&B's variables say.

    Args:
        project: vitrim where neither this nor WANDB_PROJECT is set.
        entity: user or team.
        group: the series of the run where neither this nor WANDB_RUN_GROUP is set.
        job_type: in W&B's tables.
        notes: text of the run.
        tags: words of the run.
        weights: whether the compact network's weights are part of the run's artifact.
    """

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: Sequence[str] = ()
    weights: bool = False

    def __post_init__(self) -> None:
        texts = ("project", "entity", "group", "job_type", "notes")
        words = isinstance(self.tags, list | tuple) and all(isinstance(t, str) for t in self.tags)
        require(
            "wandb",
            self,
            *((key, _is_text(getattr(self, key)), "null or text") for key in texts),
            ("tags", words, "a list of words, as in [a,b]"),
            ("weights", isinstance(self.weights, bool), "true or false"),
        )


def _is_text(value: object) -> bool:
    return value is None or (isinstance(value, str) and bool(value.strip()))


class Tracker(Logger):
    """Write all phases' metrics to `metrics.jsonl` in the run's folder, and to one service.

    Steps grow over the phases: those of a phase begin after the last one of the phase before.
    """

    phase: str = ""
    extra: Mapping[str, float] = MappingProxyType({})
    """What is added to the metrics of the next step that is logged."""

    def __init__(
        self,
        folder: Path,
        tracking: str,
        *,
        group: str,
        config: Mapping[str, object],
        wandb: Wandb | None = None,
    ) -> None:
        super().__init__()
        self._wandb = wandb or Wandb()
        self._file = folder / "metrics.jsonl"
        self._torn = False
        self._first_steps: dict[str, int] = {}
        self._finish: Callable[[Mapping[str, object]], None] = lambda summary: None
        self._sink: Sink | None = None
        if tracking in ("offline", "online"):
            self._guard(lambda: self._start_wandb(folder, tracking, group, config))
        elif tracking in LOGGERS:
            self._guard(lambda: self._start_logger(LOGGERS[tracking](folder, group, config)))

    @property
    def name(self) -> str:
        """Name for Lightning."""
        return "vitrim"

    @property
    def version(self) -> str:
        """Version for Lightning."""
        return self.phase

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, object] | Namespace, *args: object, **kwargs: object
    ) -> None:
        """Do nothing: the recipe is in recipe.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line of metrics, then send them to the service."""
        metrics, self.extra = {**metrics, **self.extra}, {}
        named = {f"{self.phase}/{name}": value for name, value in metrics.items()}
        if step is not None:
            step += self._first_step()
        self._append(json.dumps({"phase": self.phase, "step": step, **metrics}))
        sink = self._sink
        if sink is not None:
            self._guard(lambda: sink(named, step or 0))

    def close(self, summary: Mapping[str, object]) -> None:
        """Send the report to the service, nested values included, and end its run."""
        self._guard(lambda: self._finish(summary))

    def _first_step(self) -> int:
        """Return the step at which this phase begins, the same when it resumes."""
        if self.phase not in self._first_steps:
            self._first_steps[self.phase] = 1 + max(self._earlier_steps(), default=-1)
        return self._first_steps[self.phase]

    def _earlier_steps(self) -> Iterator[int]:
        """Iterate over the logged steps of the phases before this one."""
        try:
            lines = self._file.read_bytes().splitlines() if self._file.is_file() else []
        except OSError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # incomplete: the disk was full, or the run was killed
                continue
            if isinstance(entry, dict) and entry.get("phase") != self.phase:
                yield from (step for step in [entry.get("step")] if isinstance(step, int))

    def _append(self, line: str) -> None:
        """Write a line; a full or missing disk costs lines, but does not stop the run."""
        start = "\n" if self._torn else ""  # ends a line that a full disk left incomplete
        try:
            with self._file.open("a") as file:
                file.write(f"{start}{line}\n")
        except OSError as error:
            if not self._torn:
                _log.warning("metrics are lost: cannot write %s (%s)", self._file, error)
            self._torn = True
        else:
            self._torn = False

    def _guard(self, action: Callable[[], None]) -> None:
        """Run what concerns the service only; after its first failure, continue without it."""
        try:
            action()
        except (Exception, SystemExit) as error:  # a service may fail in any way
            self._sink = None
            self._finish = lambda summary: None
            _log.warning("tracking continues in %s only: %s", self._file.name, error)

    def _start_wandb(
        self, folder: Path, mode: str, group: str, config: Mapping[str, object]
    ) -> None:
        import wandb

        chosen = self._wandb
        named = {key: os.environ.get(name) for key, name in _VARIABLES.items()}
        limits = {k: v for k, v in _LIMITS.items() if k in wandb.Settings.model_fields}
        with _without_terminal():
            run = wandb.init(
                project=chosen.project or named["project"] or "vitrim",
                entity=chosen.entity,
                dir=folder,
                mode=mode,  # type: ignore[arg-type]
                group=chosen.group or named["group"] or group,
                job_type=chosen.job_type,
                notes=chosen.notes,
                tags=chosen.tags or None,
                name=os.environ.get("WANDB_NAME") or folder.name,
                id=run_id(folder),
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, **limits),
            )
        phases: set[str] = set()
        run.define_metric("top1", step_metric="strength")
        run.define_metric("macs", step_metric="strength")

        def finish(summary: Mapping[str, object]) -> None:
            run.log({key: value for key, value in _point(summary).items() if value is not None})
            run.summary.update(dict(summary))
            run.log_artifact(_artifact(folder, summary, weights=chosen.weights))
            run.finish()

        def sink(metrics: Mapping[str, float], step: int) -> None:
            axis = f"{self.phase}/step"
            if self.phase not in phases:  # curves of each phase have an axis of their own
                phases.add(self.phase)
                run.define_metric(axis)
                run.define_metric(f"{self.phase}/*", step_metric=axis)
            run.log({**metrics, axis: step - self._first_step()})

        self._sink, self._finish = sink, finish

    def _start_logger(self, logger: Logger) -> None:
        def sink(metrics: Mapping[str, float], step: int) -> None:
            logger.log_metrics(dict(metrics), step)

        def finish(summary: Mapping[str, object]) -> None:
            point = {f"curve/{k}": v for k, v in _point(summary).items() if v is not None}
            logger.log_metrics(point, 0)
            logger.finalize("finished")  # after "success" TensorBoard's writes hparams.yaml

        self._sink, self._finish = sink, finish


def run_id(folder: Path) -> str:
    """Return the id of a folder's run: that of an agent of W&B, or one that the folder decides.

    A job of a sweep by vitrim has an id of its own, whatever its parent's environment says.
    """
    given = os.environ.get("WANDB_RUN_ID")
    return given if given and STATUS_COPY not in os.environ else digest(str(folder.absolute()))


@contextmanager
def _without_terminal() -> Iterator[None]:
    """Hide the terminal: without a key W&B then fails at once, instead of asking for one."""
    terminal = sys.stdin
    with Path(os.devnull).open() as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = terminal


def _point(summary: Mapping[str, object]) -> dict[str, float | None]:
    """Return the run's point on the strength-accuracy curve."""
    compact = cast(Mapping[str, float | None], summary["compact"])
    strength = cast(float | None, summary["strength"])
    return {"strength": strength, "top1": compact["top1"], "macs": compact["macs"]}


def _artifact(folder: Path, report: Mapping[str, object], *, weights: bool) -> wandb.Artifact:
    """Return the plan, the report and the pictures of a run, and its weights if asked for."""
    import wandb

    names = ["plan.json", *(path.name for path in sorted(folder.glob("*.png")))]
    names += ["model.safetensors", "manifest.json"] if weights else []
    artifact = wandb.Artifact(f"run-{run_id(folder)}", type="run")
    for name in filter(lambda name: (folder / name).is_file(), names):
        artifact.add_file(str(folder / name))
    with artifact.new_file("report.json") as file:
        file.write(json.dumps(report, indent=1, sort_keys=True))
    return artifact
