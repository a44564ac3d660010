"""What a run says first: method, network, budget, and the trainings that follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vitrim.files import escape
from vitrim.report.console import opening

if TYPE_CHECKING:
    from vitrim.pipeline import Identity, Job


def opening_lines(job: Job, identity: Identity) -> Iterator[str]:
    """Iterate over the lines."""
    target = (job.target.metric, job.target.keep)
    line = opening(identity.method, network_of(job, identity), target, identity.strength, job.seed)
    yield escape.terminal(line)
    phases = _phases(job)
    if phases:
        yield f"epochs: {', '.join(phases)}; what finished before is loaded"


def network_of(job: Job, identity: Identity) -> str:
    """Return the network as the command names it: what `model=` chose, or timm's name."""
    choices = identity.facts.get("choices")
    chosen = choices.get("model") if isinstance(choices, dict) else None
    return job.model.name if chosen in (None, "timm") else str(chosen)


def _phases(job: Job) -> list[str]:
    """Return the trainings with labels and their epochs, in the order of the run."""
    if job.data is None:
        return []
    dense = job.model.training.epochs if not (job.model.trained or job.retrains) else 0
    trains = job.retrains or not job.target.is_identity
    recipes = [recipe.epochs for recipe in job.labelled_training] if trains else []
    named = [("dense", dense), *(("scoring", epochs) for epochs in recipes[:-1])]
    named += [("fine-tuning", recipes[-1])] if recipes else []
    named += [("control", sum(recipe.epochs for recipe in job.control_recipes))]
    return [f"{name} {epochs}" for name, epochs in named if epochs]
