"""Files of weights as plain tensors, and what folders say of the network: no code is run.

Files of torch.save are read by torch.load(weights_only=True), which builds tensors, containers and
argparse.Namespace, and refuses every other object.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vitrim.files import MANIFEST, WEIGHTS, StoreError, read_bytes, verify
from vitrim.store import read_tensors

State = dict[str, Tensor]
PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".tar")
ARRAYS = (".npz",)
_EMA = ("state_dict_ema", "model_ema", "ema")
_MODEL = ("state_dict", "model", "module", "net")
_INNER = ("state_dict", "model", "module")
_HUB_WEIGHTS = "pytorch_model.bin"
_INDEX = "model.safetensors.index.json"
_MAX_JSON, _MAX_SHARDS = 2**24, 1000
_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
_PROBLEMS = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, LookupError),
    *(AttributeError, AssertionError, ArithmeticError, MemoryError, RecursionError, ImportError),
    *(zipfile.BadZipFile, NotImplementedError, OSError),
)
"""What torch.load raises for files that are damaged or hostile."""


def is_pickle(path: Path) -> bool:
    """Whether the name is that of a file of torch.save."""
    return path.name.lower().endswith(PICKLES)


def file_of(checkpoint: str) -> Path:
    """Return the file of weights that a path names: itself, or the one in a folder."""
    path = Path(checkpoint)
    if not path.is_dir():
        return path
    names = (WEIGHTS, _INDEX, _HUB_WEIGHTS)
    return next((path / name for name in names if (path / name).is_file()), path / WEIGHTS)


def read_weights(path: Path, weights: str | None = None) -> State:
    """Return the tensors of a file.

    Args:
        path: .safetensors, the index of several of them, or a file of torch.save.
        weights: which of several state dicts: `model`, `ema`, or the name of one; None: the
            model's if there is one.

    Raises:
        StoreError: the file is missing, empty or damaged, holds an object that is no tensor, or
            has no such state dict.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    if not path.stat().st_size:
        raise StoreError(f"{path} is empty")
    if is_pickle(path):
        return chosen(_unpickled(path), weights, where=str(path))
    if path.name == _INDEX:
        state = _sharded(path)
    else:
        if (path.parent / MANIFEST).is_file() and path.name == WEIGHTS:
            verify(path.parent, (WEIGHTS,))
        state = read_tensors(path)
    return chosen(state, weights, where=str(path))


def _sharded(index: Path) -> State:
    """Return the tensors of all files that an index lists."""
    table = _json(index).get("weight_map")
    names = sorted({*table.values()}, key=str) if isinstance(table, dict) else []
    plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    if not names or not plain or len(names) > _MAX_SHARDS:
        raise StoreError(f"{index}: expected weight_map with names of files beside it")
    state: State = {}
    for name in names:
        state |= read_tensors(index.parent / name)
    return state


def _unpickled(path: Path) -> object:
    """Return what a file of torch.save holds, if that is tensors and plain data."""
    path.open("rb").close()  # where it cannot be opened, that is the error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols, which are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except _PROBLEMS as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found is not None:
            raise StoreError(
                f"{path} is a pickle with {found[1]}, which is no tensor and can run code: it was "
                "not read; save the state dict alone (torch.save(net.state_dict(), FILE)), or as "
                ".safetensors"
            ) from None
        raise StoreError(
            f"{path} is damaged or not complete, or a pickle that holds other than tensors: "
            f"it was not read ({type(error).__name__})"
        ) from None


def chosen(content: object, weights: str | None, *, where: str) -> State:
    """Return one of the state dicts in what a file holds.

    Args:
        content: a state dict, or a mapping that holds some by name.
        weights: as for `read_weights`.
        where: the file, for messages.

    Raises:
        StoreError: there is none of this name, or none at all.
    """
    found = _state_dicts(content)
    if not found:
        raise StoreError(f"{where} holds no tensors by name: expected a state dict")
    own = {"model": _MODEL, "ema": _EMA}
    if weights is None:
        wanted: Sequence[str] = ("", *_MODEL, *_EMA, *found)
    else:
        wanted = ("", *own["model"]) if weights == "model" else own.get(weights, (weights,))
    name = next((one for one in wanted if one in found), None)
    if name is None:
        shown = ", ".join(_spoken(one) for one in found)
        raise StoreError(f"{where}: no weights {weights}; it has {shown}")
    return found[name]


def _spoken(name: str) -> str:
    """Return a name of weights as `model.weights` takes it."""
    return "ema" if name in _EMA else "model" if name in ("", *_MODEL) else name


def _state_dicts(content: object) -> dict[str, State]:
    """Return the state dicts in what a file holds by name; "" for the whole of it."""
    if not isinstance(content, Mapping):
        return {}
    whole = _tensors(content)
    found = {"": whole} if whole else {}
    for name, value in content.items():
        for inner in (value, *_inside(value)):
            state = _tensors(inner)
            if isinstance(name, str) and state:
                found.setdefault(name, state)
    return found


def _inside(value: object) -> list[object]:
    return [value[key] for key in _INNER if key in value] if isinstance(value, Mapping) else []


def _tensors(content: object) -> State:
    """Return the tensors of a mapping by name; none where it holds little else than others.

    Wrappers count their steps in a tensor, which is left out.
    """
    if not isinstance(content, Mapping):
        return {}
    entries = {name: value for name, value in content.items() if name != "n_averaged"}
    state = {
        name: tensor.detach()
        for name, tensor in entries.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    return state if 2 * len(state) > len(entries) else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What a folder of timm or of transformers says of its network; None where it says nothing.

    `classes` are the names of the outputs; `image_size` is a side or height and width in pixels;
    `mean` and `std` are those of the normalisation, per channel.
    """

    num_classes: int | None = None
    image_size: int | list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: tuple[str, ...] = ()

    def settings(self) -> dict[str, object]:
        """Return what the keys of `model` can take over, by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        del values["classes"]
        return {name: value for name, value in values.items() if value is not None}


def described(folder: Path) -> Described:
    """Return what config.json and preprocessor_config.json in `folder` say of the network.

    Raises:
        StoreError: one of them is not JSON, or far larger than any.
    """
    config, processor = folder / _CONFIG, folder / _PROCESSOR
    if not config.is_file():
        return Described()
    content = _json(config)
    of_images = _json(processor) if processor.is_file() else {}
    return _of_timm(content) if "architecture" in content else _of_hub(content, of_images)


def config_of(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder; empty where there is none.

    Raises:
        StoreError: it is not JSON.
    """
    path = folder / _CONFIG
    return _json(path) if path.is_file() else {}


def _of_timm(content: Mapping[str, Any]) -> Described:
    config = content.get("pretrained_cfg")
    config = config if isinstance(config, dict) else {}
    size = config.get("input_size")
    names = content.get("label_names") or ()
    return Described(
        num_classes=_count(content.get("num_classes", config.get("num_classes"))),
        image_size=_size(size[1:] if isinstance(size, list) and len(size) == 3 else None),
        mean=_numbers(config.get("mean")),
        std=_numbers(config.get("std")),
        classes=_names(names if isinstance(names, list) else ()),
    )


def _of_hub(content: Mapping[str, Any], of_images: Mapping[str, Any]) -> Described:
    vision = content.get("vision_config")
    vision = vision if isinstance(vision, dict) else content
    labels = content.get("id2label")
    labels = labels if isinstance(labels, dict) else {}
    names = [labels.get(str(at)) for at in range(len(labels))]
    return Described(
        num_classes=_count(content.get("num_labels", len(labels) or None)),
        image_size=_size(vision.get("image_size")),
        mean=_numbers(of_images.get("image_mean")),
        std=_numbers(of_images.get("image_std")),
        classes=_names(names),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _size(value: object) -> int | list[int] | None:
    if isinstance(value, list) and len(value) == 2 and all(map(_count, value)):
        return cast(int, value[0]) if value[0] == value[1] else value
    return _count(value)


def _numbers(value: object) -> list[float] | None:
    if isinstance(value, list) and all(type(one) in (int, float) for one in value):
        return [float(one) for one in value] or None
    return None


def _names(values: Sequence[object]) -> tuple[str, ...]:
    names = tuple(value for value in values if isinstance(value, str))
    return names if len(names) == len(values) else ()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path, _MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path}: expected an object")
    return content
