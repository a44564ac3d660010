"""The recipe of a run: what of its configuration decides the result."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from vitrim.cli.checks import Config
from vitrim.errors import ConfigError, is_count
from vitrim.files import PHASES, read_yaml

LATENCY_TARGETS = ("latency", "latency_ms")
"""Targets that depend on where they were measured."""
ADDED_TARGETS = (*LATENCY_TARGETS, "size_mb")
"""Targets that later versions added; recipes have them only where they are set."""
NOT_RECIPE = (
    *("out", "tracking", "progress", "latency", "checkpoint", "sweep", "plugins"),
    *("optimized_metric", "wandb", "threads"),
)
"""Keys that change where and how a run works, not its result."""
NOT_TRAINER = (
    *("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches"),
    *("log_every_n_steps", "check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps"),
    *("enable_model_summary", "profiler", "detect_anomaly", "inference_mode", "benchmark"),
    "callbacks",
)
"""The same of the trainer; how its processes share a batch enters the global batch."""
LOADING = ("workers", "download", "loading")
"""The same of data; but for what of `loading` changes an image."""
PLACES = ("root", "train", "val", "val_labels")
"""Where images are; left out where what they contain is known."""
TRAINING_IMAGES = (
    *("samples", "samples_seed", "batch_size", "augmentation", "mixing"),
    *("shift", "rotation", "label_smoothing"),
)
"""Keys of data that do not change an evaluation."""
TRAINING_ONLY = ("limit_train_batches", "check_val_every_n_epoch")
"""The same of the trainer."""
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError)
"""What reading the recipe.yaml of a damaged or foreign folder raises."""
ADDED = {
    **{"data.val_labels": None, "data.exif_orientation": False, "method.metric": "units"},
    **{"model.weights": None, "trainer.compile": False},
}
"""Keys that later versions added, with the values by which earlier ones acted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What the paths in a recipe stand for, wherever they are.

    Args:
        checkpoint: SHA-256 of the file of weights; None: there is none.
        start: digest of the network of `from_run`; None: the dense network.
        images: `vitrim.data.content` of the data set; None: no images.
        teacher: SHA-256 of the teacher's checkpoint; None: there is none.
    """

    checkpoint: str | None
    start: str | None
    images: Mapping[str, object] | None
    teacher: str | None = None


def identifying(resolved: Config, contents: Contents) -> Config:
    """Return the part of a resolved recipe that decides the result of the run.

    Paths are replaced by what they stand for, and the batch of a process by that of all processes
    together. Addresses of classes are no part of it, so that a class can move.
    """
    known = cast(Config, _without(without_addresses(resolved), _is_neutral))
    recipe = {key: value for key, value in known.items() if key not in (*NOT_RECIPE, "from_run")}
    teacher = recipe.pop("teacher", None)
    if teacher and teacher["name"] is not None:  # its checkpoint is identified by what it contains
        left_out = ("checkpoint", "sha256")
        recipe["teacher"] = {k: v for k, v in teacher.items() if k not in left_out}
        recipe["teacher"]["checkpoint_sha256"] = contents.teacher
    for key in ("quantize", "control"):  # folders of runs without them keep their names
        if not recipe.get(key):
            recipe.pop(key, None)
    if recipe.get("heads") == "runs":
        del recipe["heads"]
    recipe["target"] = {k: v for k, v in recipe["target"].items() if k not in ADDED_TARGETS or v}
    if any(map(recipe["target"].get, LATENCY_TARGETS)):
        recipe["latency"] = _identifying_latency(resolved["latency"])
    if recipe["data"].get("samples") is None or contents.images is None:
        recipe["method"].get("sampling", {}).pop("available_images", None)
    _identify_model(recipe["model"], images=contents.images is not None)
    if contents.images is None:  # nothing is trained or evaluated
        recipe |= {"data": {}, "trainer": {}}
        del recipe["batchnorm_images"]
    else:
        recipe["data"] = _identifying_data(recipe, contents.images)
        recipe["trainer"] = _identifying_trainer(recipe["trainer"], resolved)
        trained = {key: recipe[key] for key in ("model", "method")}
        from vitrim.trainer.trainer_options import keeping_best

        if any(keeping_best(trained)):  # by validations, which then decide the result
            every = resolved["trainer"].get("check_val_every_n_epoch")
            recipe["trainer"]["check_val_every_n_epoch"] = every
    drop_added(recipe)
    recipe["checkpoint_sha256"] = contents.checkpoint
    return recipe if contents.start is None else recipe | {"from_run": contents.start}


def drop_added(recipe: Config) -> None:
    """Remove keys that later versions added, where they act as the earlier versions did."""
    for key, value in ADDED.items():
        group, _, name = key.partition(".")
        if recipe[group].get(name, ...) == value:
            del recipe[group][name]
    _drop_recovery(recipe["method"])
    _drop_losses(recipe["method"])


def _drop_losses(method: Config) -> None:
    """Remove the settings of losses that are not predicted."""
    if method.get("scope") != "loss" and method.get("allocation") != "kl":
        method.pop("losses", None)


def _drop_recovery(method: Config) -> None:
    """Remove the settings of a recovery that does not take place.

    `mimic` was the default objective before there was a recovery.
    """
    tuning = method.get("tuning")
    if not isinstance(tuning, dict) or "recovery" not in tuning:
        return
    objective = tuning.get("objective", "recovery")
    if method.get("fine_tune") and objective == "recovery":
        return
    del tuning["recovery"]
    if "objective" not in tuning:
        method.pop("fine_tune", None)  # which came with the recovery
    elif objective == "recovery":
        tuning["objective"] = "mimic"


def _identify_model(model: Config, *, images: bool) -> None:
    """Remove from `model` where its weights are, and a training that does not take place.

    An image size of two equal sides becomes one of one side.
    """
    size = model.get("image_size")
    if isinstance(size, list) and len(set(size)) == 1:
        model["image_size"] = size[0]
    loaded = model.get("pretrained") or model.get("checkpoint") is not None
    for key in ("checkpoint", "sha256"):
        model.pop(key, None)
    if not images or (loaded and not model.get("reset_head")):
        model.pop("training", None)


def _identifying_latency(latency: Config) -> Config:
    """Return what decides a plan for a time; folders of runs without the newer keys stay."""
    newer = {"heads": "runs", "precision": None, "graphs": False}
    given = {key: latency[key] for key, value in newer.items() if latency.get(key, value) != value}
    return {key: latency[key] for key in ("batch", "device")} | given


def _identifying_data(recipe: Config, images: Mapping[str, object]) -> Config:
    """Return what of the data decides the result: its content instead of its place."""
    left_out = (*LOADING, *(PLACES if images else ()))
    data = {key: value for key, value in recipe["data"].items() if key not in left_out}
    if data.get("samples") is None:
        for key in ("samples", "samples_seed"):
            data.pop(key, None)
    if "bad_images" in data:
        evaluation = data.pop("bad_images")["evaluation"]
        if evaluation != "fail":  # otherwise evaluated on all, as ever
            data["bad_images"] = {"evaluation": evaluation}
    data |= _changing_images(recipe["data"])
    if is_count(data.get("batch_size")):
        data["batch_size"] *= processes(recipe["trainer"]) * _accumulated(recipe["trainer"])
    return data | ({"images": images} if images else {})


def _changing_images(data: Config) -> Config:
    """Return what of the decoding and the augmentation differs from that of earlier versions."""
    loading = data.get("loading") or {}
    changed: Config = {}
    if loading.get("decoder", "pil") != "pil":
        changed["decoder"] = loading["decoder"]
    if loading.get("channels_last"):
        changed["channels_last"] = True
    augmentation = data.get("augmentation")
    if isinstance(augmentation, dict) and augmentation.get("backend") == "pil":
        changed["augmentation"] = {k: v for k, v in augmentation.items() if k != "backend"}
    return changed


def _identifying_trainer(trainer: Config, resolved: Config) -> Config:
    """Return what of the trainer decides the result; a limit of batches as one of images."""
    kept = {key: value for key, value in trainer.items() if key not in NOT_TRAINER}
    batch = resolved["data"].get("batch_size")
    for key in ("limit_train_batches", "limit_val_batches"):
        if is_count(kept.get(key)) and is_count(batch):
            kept[key] = {"images": kept[key] * batch * processes(trainer)}
    return kept


def processes(trainer: Mapping[str, object]) -> int:
    """Return how many processes a trainer's options request on all machines."""
    from vitrim.jobs.distributed import requested_processes

    return requested_processes(trainer) * int(str(trainer.get("num_nodes", 1)))


def _accumulated(trainer: Mapping[str, object]) -> int:
    return int(str(trainer.get("accumulate_grad_batches", 1)))


def without_addresses(node: object) -> object:
    """Return a copy of `node` without the addresses of classes."""
    return _without(node, lambda key, _: key == "_target_")


def _without(node: object, is_left_out: Callable[[str, object], bool]) -> object:
    """Return a copy of nested plain data without the keys and values that are left out."""
    if isinstance(node, dict):
        return {k: _without(v, is_left_out) for k, v in node.items() if not is_left_out(k, v)}
    return [_without(item, is_left_out) for item in node] if isinstance(node, list) else node


def _is_neutral(key: str, value: object) -> bool:
    """Whether a number of a training acts as before there was that key."""
    from vitrim.trainer.recipe import NEUTRAL  # imports torch

    return key in NEUTRAL and value == NEUTRAL[key]


def of_series(recipe: Config) -> Config:
    """Return what the runs of a series share: all but budget, seed and the draw of images."""
    series = copy.deepcopy(recipe)
    for key in ("strength", "target", "seed"):
        del series[key]
    series.pop("revision", None)  # which the seed may decide
    series["method"].pop("seed", None)
    series["data"].pop("samples_seed", None)
    return series


def of_start(recipe: Config) -> Config:
    """Return what decides a dense network that the run trains, and what its scorer sees."""
    keys = ("model", "data", "trainer", "seed", "checkpoint_sha256", "batchnorm_images")
    return {key: recipe.get(key) for key in keys} | {"choices": {"data": recipe["choices"]["data"]}}


def of_evaluation(recipe: Config) -> Config:
    """Return what decides the accuracy of a dense network whose weights are loaded."""
    data = {key: value for key, value in recipe["data"].items() if key not in TRAINING_IMAGES}
    if "images" in data:
        data["images"] = data["images"]["evaluation"]
    model = recipe["model"]
    drawn = model.get("pretrained") and model.get("num_classes") is not None
    return {
        "model": model,
        "checkpoint_sha256": recipe["checkpoint_sha256"],
        "data": data,
        "choices": {"data": recipe["choices"]["data"]},
        "trainer": {k: v for k, v in recipe["trainer"].items() if k not in TRAINING_ONLY},
        "seed": recipe["seed"] if drawn else None,  # timm draws a head of another size
    }


def check_resumable(folder: Path, resolved: Config, contents: Contents) -> None:
    """Raise ConfigError if a run of another recipe has begun in `folder`.

    One that has finished a phase, or saved within one, also needs its batches split among as many
    processes as before: with others, its result would not be that of an uninterrupted run.

    Args:
        folder: of the run, with its recipe.yaml if it was started before.
        resolved: the configuration of this run.
        contents: of its paths; those of the recipe.yaml are assumed to be the same.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    try:
        known = cast(Config, read_yaml(path))
        before = identifying(known, contents)
    except DAMAGED:
        raise ConfigError(
            f"{path} cannot be read: move its folder away, or run with out=DIR"
        ) from None
    way_out = "move the folder away, or run with out=DIR"
    differing = _differences(before, identifying(resolved, contents))
    if differing:
        raise ConfigError(
            f"{folder} was started with another recipe: {', '.join(differing)}; {way_out}"
        )
    if contents.images is not None and any((folder / PHASES).glob("*/*")):
        differing = [*_differences(_split(known), _split(resolved))]
        if differing:
            raise ConfigError(
                f"{folder} was started with its batches split differently: {', '.join(differing)}; "
                f"resume it as it was started, {way_out}"
            )


def _split(resolved: Config) -> Config:
    """Return how a run shares a batch among its processes."""
    trainer, number = resolved["trainer"], processes(resolved["trainer"])
    strategy = str(trainer.get("strategy")) if number > 1 else "auto"
    return {
        "processes": number,
        "data": {"batch_size": resolved["data"].get("batch_size")},
        "trainer": {
            "accumulate_grad_batches": _accumulated(trainer),
            "accelerator": str(trainer.get("accelerator")).replace("cuda", "gpu"),
            "strategy": strategy.replace("auto", "ddp"),
        },
    }


def _differences(known: Config, now: Config) -> list[str]:
    """Return the keys whose values differ between two nested recipes, with both values."""
    old, new = dict(leaves(known)), dict(leaves(now))
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [f"{key} ({old.get(key)}, now {new.get(key)})" for key in keys]


def leaves(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Iterate over the values of a nested recipe that are no mappings, by dotted key."""
    if not isinstance(node, dict) or not node:
        yield key, node
        return
    for name, child in node.items():
        yield from leaves(child, f"{key}.{name}" if key else str(name))
