"""Keys of a configuration that a run would ignore or overrule, or that nothing takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

from vitrim.cli.checks import Config
from vitrim.errors import is_count, is_rate, shown

TRAINER = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "accumulate_grad_batches"),
    *("limit_train_batches", "limit_val_batches", "val_check_interval", "check_val_every_n_epoch"),
    *("num_sanity_val_steps", "log_every_n_steps", "enable_model_summary", "profiler"),
    *("deterministic", "benchmark", "inference_mode", "detect_anomaly", "sync_batchnorm"),
    *("callbacks", "compile"),
)
"""Arguments of lightning.Trainer that a run takes, and `compile`."""
_EPOCHS = "each phase has its epochs: model.training.epochs, and the epochs below method"
_CLIP = "each phase has its clip_norm: model.training.clip_norm, and those below method"
_CHECKPOINTS = "set checkpoint.minutes"
_WHOLE = "set the epochs of the phases, and trainer.limit_train_batches for a part of each"
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("trainer.max_epochs", "trainer.min_epochs"), _EPOCHS),
    **dict.fromkeys(("trainer.max_steps", "trainer.min_steps", "trainer.fast_dev_run"), _WHOLE),
    "trainer.max_time": "set sweep.minutes for the jobs of a sweep, or the epochs of the phases",
    "trainer.overfit_batches": "set data.samples for a part of the training images",
    "trainer.gradient_clip_val": _CLIP,
    "trainer.gradient_clip_algorithm": _CLIP,
    "trainer.plugins": "a run has its own: hydra/launcher=slurm or torchrun start processes",
    "trainer.logger": "set tracking",
    "trainer.enable_progress_bar": "set progress",
    "trainer.enable_checkpointing": _CHECKPOINTS,
    "trainer.default_root_dir": "set out",
    "trainer.use_distributed_sampler": "the processes share out the images by themselves",
    "callbacks": "set trainer.callbacks, a list",
    "logger": "set tracking",
    "model.args.img_size": "set model.image_size",
    "model.args.num_classes": "set model.num_classes",
    "model.args.pretrained": "set model.pretrained",
    "model.args.checkpoint_path": "set model.checkpoint",
    "data.n_classes": "the images tell the number of classes; data.classes selects some of them",
    "data.augmentation.input_size": "set model.image_size",
    "data.augmentation.mean": "set model.mean",
    "data.augmentation.std": "set model.std",
}
"""Key that a run would ignore or overrule: what to set instead."""
_OF_TIMM = ("augmentation", "mixing")
_OPEN = ("model.args",)
"""Mappings whose keys are checked by the network that takes them."""
_MAY_BE: Mapping[type, set[str]] = {dict: {"keys"}, list: {"list"}, str: {"value"}}
"""What a value of plain data may be (`_shape_of`), where it is no number."""
_NOT_TRAINING = (
    *("input_size", "mean", "std", "interpolation", "is_training", "crop_pct", "crop_mode"),
    *("crop_border_pixels", "tf_preprocessing", "use_prefetcher", "normalize", "separate"),
)
"""Arguments of timm's create_transform that the run sets, or that training does not look at."""


def root_problems(cfg: Config, file: Path, groups: Collection[str]) -> list[str]:
    """Return which keys of a configuration outside its groups nothing takes, a sentence each.

    Args:
        cfg: the configuration.
        file: the yaml that has all its keys.
        groups: the keys that are groups.
    """
    return [*_beyond(cfg, {**_root(file), **{group: None for group in groups}}, "")]


@cache
def _root(file: Path) -> Config:
    """Return the keys of a yaml of vitrim's own and their values, read once in a process."""
    known = yaml.safe_load(file.read_text())
    return {key: value for key, value in known.items() if key not in ("defaults", "hydra")}


def _beyond(node: Config, known: Config, where: str) -> Iterator[str]:
    """Iterate over what is wrong with keys that `known` lacks, there and below."""
    for key, value in node.items():
        name = f"{where}{key}"
        if key not in known:
            yield _unknown(name, known)
        elif isinstance(known[key], dict) and isinstance(value, dict):
            yield from _beyond(value, known[key], f"{name}.")


def group_problems(node: Config, group: str) -> list[str]:
    """Return which keys of a group nothing takes, and values of trainer that cannot work.

    Args:
        node: the group, resolved, its addresses checked (`vitrim.cli.guard`).
        group: its name.
    """
    if group == "trainer":
        return [*_surplus(node, TRAINER, group, special=("_target_", "_partial_")), *_limits(node)]
    return [*_of_call(node, group)]


def _of_call(node: Config, where: str) -> Iterator[str]:
    """Iterate over what is wrong with the arguments of what `_target_` names."""
    module, _, name = str(node["_target_"]).rpartition(".")
    function = getattr(import_module(module), name)
    parameters = signature(function).parameters.values()
    taken = [p.name for p in parameters if p.kind is not Parameter.VAR_KEYWORD]
    if len(taken) < len([*parameters]):  # data=none takes the settings of any images
        none = node["_target_"] == "vitrim.data.none"
        taken += _of_any_data() if none else [key for key in node if key != "_target_"]
        yield from _surplus(node, taken, where)
        return
    yield from _surplus(node, taken, where)
    for key, child in node.items():
        if key in _OF_TIMM and where == "data" and not _is_for_timm(function):
            continue
        hint = _hints(function).get(key)
        if hint is not None and _is_ours(function):
            yield from _misshapen(child, f"{where}.{key}", hint)
        yield from _of_child(child, f"{where}.{key}", hint)


def _is_for_timm(function: object) -> bool:
    """Whether the mappings augmentation and mixing of a data set are arguments of timm."""
    return _is_ours(function) or hasattr(function, "splits")


def _is_ours(function: object) -> bool:
    return getattr(function, "__module__", "").startswith("vitrim.")


def _misshapen(child: object, where: str, hint: object) -> Iterator[str]:
    """Iterate over what is wrong with a value where keys, a list or a number are expected.

    What an annotation does not say is left to whatever takes the value.
    """
    members = [*_alternatives(hint)]
    kinds = {_shape_of(member) for member in members if member is not NoneType}
    may_be = _MAY_BE.get(type(child), {"value", "number"})
    if not kinds or "any" in kinds or kinds & may_be or (child is None and NoneType in members):
        return
    words = {
        "keys": f"keys and values: {where}.KEY=VALUE",
        "list": "a list",
        "number": "a number",
        "value": "a value",
    }
    allowed = " or ".join(text for kind, text in words.items() if kind in kinds)
    yield f"{where}={shown(child)}: expected {allowed}"


def _alternatives(hint: object) -> Iterator[object]:
    """Iterate over the members of a union, or over the one type that it is."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        for member in get_args(hint):
            yield from _alternatives(member)
    else:
        yield hint


def _shape_of(kind: object) -> str:
    """Return what values of a type are: keys, list, number or another value; any: unknown."""
    origin = get_origin(kind) or kind
    if origin in (int, float):
        return "number"
    if origin is Literal or origin in (bool, str):
        return "value"
    if not isinstance(origin, type):
        return "any"
    if is_dataclass(origin) or is_typeddict(origin) or issubclass(origin, Mapping):
        return "keys"
    return "list" if issubclass(origin, Collection) else "any"


def _of_child(child: object, where: str, hint: object) -> Iterator[str]:
    if not isinstance(child, dict):
        return
    if "_target_" in child:
        yield from _of_call(child, where)
    elif where in _OPEN:
        yield from (f"unknown key {k}: {INSTEAD[k]}" for k in _below(child, where) if k in INSTEAD)
    elif where in [f"data.{key}" for key in _OF_TIMM]:
        yield from _surplus(child, _of_timm(where), where, special=())
    elif is_typeddict(hint):
        yield from _surplus(child, get_type_hints(hint), where, special=())


def _of_timm(where: str) -> list[str]:
    """Return the arguments of timm's function that gets the mapping `where`."""
    from timm.data import Mixup, create_transform

    if where == "data.mixing":
        return [key for key in signature(Mixup).parameters if key != "num_classes"]
    options = signature(create_transform).parameters
    return ["backend", *(key for key in options if key not in _NOT_TRAINING)]


def _of_any_data() -> list[str]:
    """Return the arguments of all data sets."""
    from vitrim.cli.guard import FUNCTIONS
    from vitrim.data.digits import Digits

    places = [name.rpartition(".") for name in FUNCTIONS if name != "vitrim.data.none"]
    functions = [getattr(import_module(module), name) for module, _, name in places]
    return [name for function in (*functions, Digits) for name in signature(function).parameters]


@cache
def _hints(function: Callable[..., object]) -> Mapping[str, object]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # names that only the type checker imports
        return {}


def _surplus(
    node: Config, taken: Iterable[str], where: str, special: Collection[str] = ("_target_",)
) -> Iterator[str]:
    known = [*dict.fromkeys(taken)]
    for key in node:
        if key not in known and key not in special:
            yield _unknown(f"{where}.{key}", known)


def _unknown(name: str, known: Iterable[str]) -> str:
    from vitrim.cli.renamed import renamed_key

    way = INSTEAD.get(name) or f"expected one of {', '.join(map(str, known))}"
    return renamed_key(name) or f"unknown key {name}: {way}"


def _below(node: Config, where: str) -> list[str]:
    return [f"{where}.{key}" for key in node]


def _limits(trainer: Config) -> Iterator[str]:
    """Iterate over what is wrong with the values of trainer that Lightning would not name."""
    for key in ("limit_train_batches", "limit_val_batches"):
        value = trainer.get(key, 1.0)
        if not (is_count(value) or (type(value) is float and is_rate(value) and 0 < value <= 1)):
            yield (
                f"trainer.{key}={value}: expected a fraction of an epoch, above 0.0 and up to 1.0, "
                "or a number of batches"
            )
    for key in ("accumulate_grad_batches", "num_nodes"):
        if not is_count(trainer.get(key, 1)):
            yield f"trainer.{key}={trainer[key]}: expected a whole number from 1 on"
    every = trainer.get("check_val_every_n_epoch")
    if every is not None and not is_count(every):
        yield (
            f"trainer.check_val_every_n_epoch={every}: expected null, or a whole number of epochs "
            "from 1 on"
        )
    if not isinstance(trainer.get("compile", False), bool):
        yield f"trainer.compile={trainer['compile']}: expected true or false"
    if trainer.get("_partial_") is not True:
        yield f"trainer._partial_={trainer.get('_partial_')}: expected true"
