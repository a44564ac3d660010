"""What is wrong with the choices of a run, found before anything expensive begins."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vitrim.errors import ConfigError, VitrimError, is_count, is_positive, is_rate

if TYPE_CHECKING:
    from torch import nn

    from vitrim.budget.cost import Cost
    from vitrim.budget.target import Target
    from vitrim.plan import Plan

TRACKING = ("offline", "online", "tensorboard", "none")


def of_run(cfg: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the keys that stand outside the groups."""
    whole, latency = "a whole number from 1 on", cfg["latency"]
    seed, tracking, progress = cfg["seed"], cfg["tracking"], cfg["progress"]
    transfer, truth = cfg["transfer"], "true or false"
    rules = (
        ("transfer", transfer, truth, isinstance(transfer, bool)),
        ("seed", seed, "a whole number from 0 on", seed == 0 or is_count(seed)),
        ("tracking", tracking, f"one of {', '.join(TRACKING)}", tracking in TRACKING),
        ("progress", progress, truth, isinstance(progress, bool)),
        ("latency.batch", latency["batch"], whole, is_count(latency["batch"])),
        ("latency.repeats", latency["repeats"], whole, is_count(latency["repeats"])),
        ("latency.blocks", latency["blocks"], "true or false", isinstance(latency["blocks"], bool)),
    )
    wrong = [
        f"{key}={value}: expected {allowed}" for key, value, allowed, fits in rules if not fits
    ]
    every, limit = cfg["checkpoint"]["minutes"], cfg["sweep"]["minutes"]
    if not is_rate(every):
        wrong.append(f"checkpoint.minutes={every}: expected a number from 0 on")
    if limit is not None and not is_positive(limit):
        wrong.append(f"sweep.minutes={limit}: expected null or a number above 0")
    if transfer is True and cfg["from_run"] is None:
        wrong.append(
            "transfer=true needs a network to begin with: from_run=FOLDER, the folder of its run"
        )
    return [*wrong, *_of_quantize(cfg)]


def one_process(trainer: Mapping[str, Any]) -> None:
    """Raise ConfigError if the jobs of a local sweep would be of several processes each."""
    from vitrim.jobs.distributed import wanted

    if wanted(trainer) > 1 or trainer.get("num_nodes", 1) > 1:
        raise ConfigError(
            f"trainer.devices={trainer['devices']} (strategy {trainer.get('strategy')}) in a local "
            "sweep: run its jobs one by one without -m, each under torchrun if you like, submit "
            "the sweep with hydra/launcher=slurm, or set trainer.devices=1"
        )


def same_recipe(path: Path, resolved: Mapping[str, Any], *, apart: Collection[str]) -> None:
    """Raise ConfigError if a run of another recipe has begun in the folder of `path`.

    Args:
        path: its recipe.yaml, if there is one.
        resolved: the recipe of this run.
        apart: top-level keys that may differ.
    """
    if not path.is_file():
        return
    try:
        known: Any = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        known = None
    if not isinstance(known, dict):
        raise ConfigError(f"{path} cannot be read: move its folder away, or run with out=DIR")
    old, new = _flat(known), _flat(resolved)
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    differing = [
        f"{key} ({old.get(key)}, now {new.get(key)})"
        for key in keys
        if key.split(".")[0] not in apart
    ]
    if differing:
        raise ConfigError(
            f"{path.parent} was begun with another recipe: {', '.join(differing)}; move the folder "
            "away, or run with out=DIR"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of a nested recipe by dotted name."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    parts = [_flat(child, f"{name}.{key}" if name else str(key)) for key, child in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def _of_quantize(cfg: Mapping[str, Any]) -> list[str]:
    if cfg["quantize"] == []:
        return []
    from vitrim.deploy import quantize

    try:
        quantize.check(cfg["quantize"], accelerator=cfg["trainer"].get("accelerator", "auto"))
    except ConfigError as error:
        return [str(error)]
    return []


def start(
    folder: str | None, model: Any, *, transfer: bool, seed: int
) -> tuple[nn.Module, Plan] | None:
    """Return the compact network to start from, and its plan; None where there is none.

    With `transfer` its classifier is drawn anew by `seed`, for the model's classes.

    Raises:
        VitrimError: no folder of a run, damaged, or of another network.
    """
    from vitrim.model.transfer import but_classes, with_new_head
    from vitrim.store import load

    if folder is None:
        return None
    if not (Path(folder) / "manifest.json").is_file():
        raise ConfigError(
            f"from_run={folder}: no folder of a finished run; it is the one that report.json is in"
        )
    net, plan = load(folder)
    dense = model.description()
    alike = but_classes(plan.model) == but_classes(dense)
    if not (alike if transfer else plan.model == dense):
        raise ConfigError(
            f"from_run={folder} was cut from {plan.model}, this run's model is {dense}: "
            f"choose the same model{', or transfer=true for a new head' if alike else ''}"
        )
    return with_new_head(net, plan, dense, model.n_classes, seed=seed) if transfer else (net, plan)


def identity(folder: str | None) -> str | None:
    """Return what tells the network saved in `folder` from others, wherever the folder is."""
    from vitrim.files import sha256

    return None if folder is None else sha256(Path(folder) / "manifest.json")


def mismatches(
    cfg: Mapping[str, Any], built: Mapping[str, Any], choices: Mapping[str, str | None]
) -> list[str]:
    """Return why what the groups built does not go together, one sentence each."""
    from vitrim.budget.cost import Cost

    model, method, data = built["model"], built["method"], built["data"]
    problems = []
    try:
        cost = Cost(model.skeleton(), model.spec().size, timing=built["timing"])
        if built["start"] is None:
            method.check(cost)
        elif method.budget.is_time:
            problems.append(
                f"target.{method.budget.metric}: times are foretold of dense networks only, not "
                "of a from_run: choose target.macs"
            )
        else:
            problems += _nothing_left(cfg["from_run"], cost, built["start"][1], method.budget)
            method.check(Cost(built["start"][0], cost.input_size, cost))
        if not method.budget.is_identity:
            method.scorer(model.skeleton())
    except VitrimError as error:
        problems.append(str(error))
    if cfg["transfer"] and not method.budget.is_identity:
        problems.append(
            "transfer=true trains and removes nothing: set strength=0 and no target; a run with "
            "from_run=FOLDER of the transferred network compresses it further"
        )
    if data is None:
        return [*problems, *(["transfer=true trains: data=none has no images"] * cfg["transfer"])]
    if data.n_classes != model.n_classes:
        problems.append(
            f"data={choices['data']} has {data.n_classes} classes, the head of "
            f"model={choices['model']} has {model.n_classes}: set "
            f"model.num_classes={data.n_classes} (and model.reset_head=true "
            "with a checkpoint of other classes), or choose other data"
        )
    trains = cfg["transfer"] or not model.trained or not method.budget.is_identity
    if trains and not data.trainable:
        problems.append(
            f"data.root={cfg['data'].get('root')} has no training images, and this run trains, or "
            "looks at some to rank units"
        )
    try:
        data.module(model.spec())
    except ConfigError as error:
        problems.append(str(error))
    return problems


def _nothing_left(folder: str, cost: Cost, begun: Plan, budget: Target) -> list[str]:
    """Return what is wrong with a budget that the network to start from is within already."""
    if budget.is_identity or budget.metric == "units":
        return []
    metric, limit = budget.unit, cost.allowed(budget)
    has = getattr(cost.plan(begun), metric)
    if has > limit:
        return []
    share = has / getattr(cost.dense_count, metric)
    return [
        f"target.{budget.metric}={budget.keep} leaves {limit:,} {metric}, and from_run={folder} "
        f"has only {has:,} already ({share:.4f} of the dense network's): set a smaller budget"
    ]
