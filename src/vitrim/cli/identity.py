"""The identity of a run: digests of its recipe, and the names of its folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vitrim.cli import guard, plugins
from vitrim.cli.checks import Config, network_digest
from vitrim.cli.compose import GROUPS, choice
from vitrim.cli.earlier import earlier_run
from vitrim.cli.recipe import (
    NOT_RECIPE,
    Contents,
    identifying,
    of_evaluation,
    of_series,
    of_start,
    without_addresses,
)
from vitrim.files import digest
from vitrim.versions import versions

if TYPE_CHECKING:
    from vitrim.pipeline import Identity, Job


def identity_of(cfg: DictConfig, job: Job, contents: Contents) -> tuple[Identity, Path]:
    """Return the identity of a run and its folder, which is an earlier version's if it has one."""
    from vitrim.data.description import describe_images
    from vitrim.data.outputs import listing
    from vitrim.method import Revised
    from vitrim.pipeline import Identity

    resolved = cast(Config, OmegaConf.to_container(cfg, resolve=True))
    choices = {group: choice(group) for group in (*GROUPS, "experiment")}
    recipe = identifying(resolved, contents)
    if listing(job.data) > 1:
        recipe["data"]["listing"] = listing(job.data)
    of_plugins = _plugins(resolved, job)
    for group, packages in of_plugins.items():
        recipe[group]["plugins"] = packages
    if "trainer" in of_plugins:  # those of Lightning only watch
        recipe["trainer"]["callbacks"] = without_addresses(resolved["trainer"]["callbacks"])
    recipe["choices"] = {group: choices[group] for group in ("data", "method")}
    if isinstance(job.method, Revised) and job.method.revision > 1:
        recipe["revision"] = job.method.revision
    if job.quantize:  # 2: int8 networks are saved; those of 0.1.0 were torchao's, and were not
        recipe["quantize"] = {"schemes": recipe["quantize"], "revision": 2}
    targets = [name for name, keep in resolved["target"].items() if keep is not None]
    point = "-".join(f"{name}{resolved['target'][name]}" for name in targets)
    point = f"{point or f's{cfg.strength:g}'}-seed{cfg.seed}"
    label = "-".join(str(choices[group]) for group in ("model", "data", "method"))
    start = of_start(recipe)
    dense = of_evaluation(recipe) if job.data is not None and job.model.trained else start
    recipe_hash, series = digest(recipe), f"{label}-{digest(of_series(recipe))}"
    strength = None if targets else cfg.strength
    identity = Identity(
        method=str(choices["method"]),
        strength=strength,
        recipe=resolved,
        digest=recipe_hash,
        dense_key=digest(dense),
        start_key=digest([start, contents.start]) if contents.start else digest(start),
        series=series,
        name=f"{point}-{recipe_hash}",
        facts={
            "choices": choices,
            "strength": strength,
            "seed": cfg.seed,
            "samples": resolved["data"].get("samples"),
            "dataset": {"name": choices["data"], **describe_images(job.data)},
            "overrides": _overrides(),
            "recipe_hash": recipe_hash,
            "series": series,
            "variant": _variant(job),
            **_limits(resolved),
            **({"plugins": of_plugins} if of_plugins else {}),
            **_weights_facts(job, recipe),
            **versions(),
        },
    )
    folder = job.out / identity.series / identity.name
    if (folder / "report.json").is_file():
        return identity, folder
    earlier = earlier_run(job.out, label, point, recipe, resolved, contents)
    return identity, earlier or folder


def contents_of(cfg: DictConfig, job: Job) -> Contents:
    """Return what the paths in the configuration of a job stand for."""
    from vitrim.data.content import content

    return Contents(
        checkpoint=job.model.fingerprint(),
        start=network_digest(cfg.from_run),
        images=content(job.data),
        teacher=job.teacher.fingerprint() if job.teacher else None,
    )


def _plugins(resolved: Config, job: Job) -> dict[str, list[str]]:
    """Return the packages of others that build a part of the run, by its group."""
    import timm

    packages = guard.named()
    groups = GROUPS if job.data is not None else ("model", "method")
    used = {group: plugins.used_by(resolved[group], packages) for group in groups}
    name = str(getattr(job.model, "name", "")).split(".")[0]
    if timm.is_model(name):
        home = f"{timm.model_entrypoint(name).__module__}."
        used["model"] += [
            p for p in packages if home.startswith(f"{p}.") and p not in used["model"]
        ]
    return {group: sorted(found) for group, found in used.items() if found}


def _limits(resolved: Config) -> dict[str, object]:
    """Return what the report says of a run that trains or evaluates on a part of the images."""
    keys = ("limit_train_batches", "limit_val_batches")
    limits = {key: resolved["trainer"].get(key, 1.0) for key in keys}
    parts = {key: limit for key, limit in limits.items() if limit != 1 or type(limit) is int}
    return {"limits": parts} if parts and resolved["data"] else {}


def _overrides() -> list[str]:
    """Return the words of the command line that decide the result, without those with paths."""
    words = HydraConfig.get().overrides.task
    places = ("data.root", "data.val_labels", "model.checkpoint", "teacher.checkpoint", "from_run")
    unsaid = (*NOT_RECIPE, *places)
    keys = {word: word.lstrip("+~").partition("=")[0] for word in words}
    return [w for w, key in keys.items() if not any(f"{key}.".startswith(f"{k}.") for k in unsaid)]


def _weights_facts(job: Job, recipe: Config) -> dict[str, object]:
    """Return what the report says of the checkpoint, the types of its weights, and of a teacher."""
    from vitrim.model.checkpoint import dtypes_of

    checkpoint = job.model.checkpoint
    facts: dict[str, object] = {k: v for k, v in recipe.items() if k == "teacher"}
    if checkpoint is not None:
        facts["checkpoint_dtype"] = dtypes_of(checkpoint, job.model.weights)
    return facts


def _variant(job: Job) -> str:
    """Return what tells the method of a run from its defaults, for tables."""
    from vitrim.model.transfer import methods_of

    if job.retrains and job.start is not None:
        return methods_of(job.start.plan)
    overrides = HydraConfig.get().overrides.task
    words = [word for word in overrides if word.startswith("method.")]
    return " ".join(sorted(word.removeprefix("method.") for word in words))
