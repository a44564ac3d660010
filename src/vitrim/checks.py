"""What is wrong with the choices of a run, found before anything expensive begins."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from inspect import isclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vitrim.errors import ConfigError, VitrimError, is_count, is_positive, is_rate

if TYPE_CHECKING:
    from torch import nn

    from vitrim.plan import Plan
    from vitrim.target import Cost, Target

FUNCTIONS = (
    "vitrim.data.none",
    "vitrim.data.cifar.cifar",
    "vitrim.data.fine.fine",
    "vitrim.data.imagefolder.image_folder",
)
"""Functions that a `_target_` may name."""
CLASSES: Mapping[str, tuple[str, ...] | None] = {
    "lightning": ("Trainer",),
    "lightning.pytorch": ("Trainer",),
    "lightning.pytorch.callbacks": None,
    "lightning.pytorch.loggers": None,
    "lightning.pytorch.plugins": None,
    "lightning.pytorch.plugins.environments": None,
    "lightning.pytorch.strategies": None,
    "torch.optim": None,
    "torch.optim.lr_scheduler": None,
    "torchmetrics.classification": None,
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "FakeData", "Flowers102", "ImageFolder"),
    "torchvision.transforms": None,
    "torchvision.transforms.v2": None,
}
"""Modules, with the classes there that a `_target_` may name; None: all of their own package."""
BUILT_BY = {
    "model": ("vitrim.model.",),
    "method": ("vitrim.method.",),
    "data": ("vitrim.data.",),
    "trainer": ("lightning.Trainer", "lightning.pytorch.Trainer"),
}
"""What the `_target_` of a group begins with."""
PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
LOG_FILES = "${hydra.runtime.output_dir}/"
_MAX_YAML, _MAX_BRACKETS, _MAX_DEPTH = 2**16, 2000, 64
_PLAIN_TAGS = "tag:yaml.org,2002:"
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
    from vitrim.processes import wanted

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
    from vitrim import quantize

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
    from vitrim.store import load
    from vitrim.transfer import but_classes, with_new_head

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
    from vitrim.store import sha256

    return None if folder is None else sha256(Path(folder) / "manifest.json")


def mismatches(
    cfg: Mapping[str, Any], built: Mapping[str, Any], choices: Mapping[str, str | None]
) -> list[str]:
    """Return why what the groups built does not go together, one sentence each."""
    from vitrim.target import Cost

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


def targets(node: Any, where: str) -> None:
    """Refuse a `_target_` that is not on the list: configs must not be able to run any code.

    Args:
        node: a part of the configuration with its interpolations resolved.
        where: its key.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{where}={node}: expected no interpolation that is left for later")
    if isinstance(node, list):
        for place, item in enumerate(node):
            targets(item, f"{where}.{place}")
    if not isinstance(node, dict):
        return
    if where in BUILT_BY and not str(node.get("_target_")).startswith(BUILT_BY[where]):
        raise ConfigError(
            f"{where}._target_={node.get('_target_')}: expected {' or '.join(BUILT_BY[where])}"
        )
    if "_target_" in node and not _is_allowed(node["_target_"]):
        raise ConfigError(
            f"{where}._target_={node['_target_']}: expected a dataclass where vitrim. defines it, "
            f"{', '.join(FUNCTIONS)}, or a class of {', '.join(CLASSES)}"
        )
    for key, value in node.items():
        targets(value, f"{where}.{key}")


def _is_allowed(target: Any) -> bool:
    """Whether `target` names a builder by its own address: where it is defined, or exported."""
    if not isinstance(target, str) or "._" in target:
        return False
    module, _, name = target.rpartition(".")
    ours = module.startswith("vitrim.")
    if target in FUNCTIONS:
        return True
    if not ours and (module not in CLASSES or name not in (CLASSES[module] or (name,))):
        return False
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        return False
    home = found.__module__ if isclass(found) else ""
    if ours:
        return home == module and is_dataclass(found)
    return home.partition(".")[0] == module.partition(".")[0]


def of_hydra(node: Mapping[str, Any]) -> None:
    """Refuse what Hydra itself would run for a configuration: its node is `node`, unresolved.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    if node.get("callbacks"):
        raise ConfigError(f"hydra.callbacks={node['callbacks']}: expected none")
    if node["job"]["env_set"]:
        raise ConfigError(
            f"hydra.job.env_set={node['job']['env_set']}: expected none; set variables in the shell"
        )
    for place in ("launcher", "sweeper"):
        _plugin(node.get(place), f"hydra.{place}")
    for key, value in node.items():
        _refuse_calls(value, f"hydra.{key}", plugin=key in ("launcher", "sweeper"))
    for key in ("job_logging", "hydra_logging"):
        _of_logging(node.get(key), f"hydra.{key}")


def _plugin(node: Any, where: str) -> None:
    target = node.get("_target_") if isinstance(node, dict) else node
    if not str(target).startswith(PLUGINS):
        raise ConfigError(f"{where}={target}: expected a plugin, of {' or '.join(PLUGINS)}")


def _refuse_calls(node: Any, where: str, *, plugin: bool = False) -> None:
    """Refuse keys that make Hydra or Python's logging call something, `plugin` excepted."""
    if isinstance(node, list):
        for place, item in enumerate(node):
            _refuse_calls(item, f"{where}.{place}")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == "()" or (key == "_target_" and not plugin):
            raise ConfigError(f"{where}.{key}={value}: expected nothing that is called")
        _refuse_calls(value, f"{where}.{key}")


def _of_logging(node: Any, where: str) -> None:
    """Refuse handlers and formatters that are not plain, and files outside a run's folder."""
    if isinstance(node, str) and "${" in node and not node.startswith(LOG_FILES):
        raise ConfigError(f"{where}={node}: expected no interpolation")
    if isinstance(node, list):
        for place, item in enumerate(node):
            _of_logging(item, f"{where}.{place}")
    if not isinstance(node, dict):
        return
    if "class" in node and node["class"] not in HANDLERS:
        raise ConfigError(f"{where}.class={node['class']}: expected one of {', '.join(HANDLERS)}")
    file = node.get("filename", LOG_FILES)
    if not str(file).startswith(LOG_FILES) or ".." in str(file):
        raise ConfigError(f"{where}.filename={file}: expected one below {LOG_FILES}")
    for key, value in node.items():
        _of_logging(value, f"{where}.{key}")


def of_files(folder: Path) -> None:
    """Refuse yaml files that are no plain data, or that grow beyond measure when they are read.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    for path in sorted(folder.rglob("*.yaml")):
        with path.open("rb") as file:
            content = file.read(_MAX_YAML + 1)
        try:
            if len(content) > _MAX_YAML or not _is_small(content):
                raise ConfigError(
                    f"{path}: expected up to {_MAX_YAML:,} bytes, values with all aliases written "
                    f"out, and {_MAX_DEPTH} levels"
                )
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: no plain yaml: {error}") from None


def _is_small(content: bytes) -> bool:
    """Whether the values in a yaml file stay few once its aliases are written out."""
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    if content.count(b"[") + content.count(b"{") > _MAX_BRACKETS:  # parsers take their square
        return False
    for event in yaml.parse(content, Loader=yaml.CSafeLoader):
        tag = getattr(event, "tag", None)
        if tag is not None and (not tag.startswith(_PLAIN_TAGS) or "python" in tag):
            raise yaml.YAMLError(f"the tag {tag} can run code")
        match event:
            case yaml.CollectionStartEvent():
                open_nodes.append((event.anchor, 1))
                continue
            case yaml.CollectionEndEvent():
                anchor, size = open_nodes.pop()
                sizes[anchor] = size
            case yaml.AliasEvent():
                size = sizes.get(event.anchor, _MAX_YAML)  # of one that holds itself, no end
            case yaml.ScalarEvent():
                size = sizes[event.anchor] = 1
            case _:
                continue
        around, before = open_nodes[-1]
        open_nodes[-1] = (around, before + size)
        if before + size > _MAX_YAML or len(open_nodes) > _MAX_DEPTH:
            return False
    return True
