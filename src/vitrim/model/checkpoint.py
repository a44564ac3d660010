"""Checkpoints of dense networks: files and folders of many libraries, or folders of runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrim.errors import ConfigError, shown
from vitrim.files import PLAN, WEIGHTS, StoreError, read_text, sha256
from vitrim.model.conversion import converted, from_arrays
from vitrim.model.layout import NAMES, layout_of, nearest
from vitrim.model.reading import ARRAYS, PICKLES, Described, described, file_of, read_weights
from vitrim.plan import MAX_BYTES, PlanError, loads
from vitrim.store import mismatches

_log = logging.getLogger(__name__)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # a scheme; one letter is a drive
_UNREAD = (".pkl", ".pickle", ".npy", ".zip", ".gz", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx")
_CLASSIFIERS = ("head.", "head_dist.", "linear_head.", "fc.", "classifier.")
_HEADS = (*_CLASSIFIERS, "cls_classifier.", "distillation_classifier.", "heads.")
_WRAPPERS = ("module.", "_orig_mod.", "net.", "model.", "backbone.")
_KNOWN = 0.5
"""Share of a network's tensors that a file needs, so that it is taken for one of that network."""


def check_path(checkpoint: str) -> None:
    """Refuse an address, and types of files that hold no weights of torch, or that cannot be read.

    Raises:
        ConfigError: `checkpoint` is one of them.
    """
    if not isinstance(checkpoint, str):
        raise ConfigError(f"model.checkpoint={shown(checkpoint)}: expected the name of a file")
    if _ADDRESS.match(checkpoint):
        raise ConfigError(
            f"model.checkpoint={checkpoint}: an address; download the file yourself, set its path, "
            "and set model.sha256 to its SHA-256"
        )
    if checkpoint.lower().endswith(_UNREAD) and not Path(checkpoint).is_dir():
        raise ConfigError(
            f"model.checkpoint={checkpoint}: a file type that is not read: expected a .safetensors "
            f"file, {', '.join((*PICKLES, *ARRAYS))}, or a folder of a run, of timm or of "
            "transformers"
        )


def fingerprint_of(checkpoint: str, expected: str | None) -> str:
    """Return the SHA-256 of the checkpoint.

    Raises:
        ConfigError: there is no such file, or its SHA-256 is not the expected one.
    """
    path = file_of(checkpoint)
    if not path.is_file():
        raise ConfigError(f"model.checkpoint={checkpoint}: no such file")
    digest = sha256(path)
    if expected not in (None, digest):
        raise ConfigError(
            f"model.checkpoint={checkpoint}: its SHA-256 is {digest}, model.sha256 "
            f"expects {expected}: the file is damaged, or another one"
        )
    return digest


def dtypes_of(checkpoint: str, weights: str | None = None) -> str:
    """Return the floating-point types of the checkpoint's tensors, joined by commas.

    Raises:
        ConfigError: the file is damaged.
    """
    if checkpoint.lower().endswith(ARRAYS):
        return "float32"
    dtypes = {
        str(tensor.dtype).removeprefix("torch.")
        for tensor in read(checkpoint, weights).values()
        if tensor.is_floating_point()
    }
    return ", ".join(sorted(dtypes))


def description_in(checkpoint: str) -> Described:
    """Return what config.json says where the checkpoint is a folder of timm or transformers.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        return described(Path(checkpoint))
    except StoreError as error:
        raise ConfigError(f"model.checkpoint={checkpoint}: {error}") from None


def read_checkpoint(
    checkpoint: str,
    model: Mapping[str, object],
    net: nn.Module,
    *,
    reset_head: bool,
    weights: str | None = None,
    layout: str | None = None,
) -> dict[str, Tensor]:
    """Return the checkpoint's tensors as timm loads them into `net`, in float32.

    Args:
        checkpoint: the file, or the folder that holds it.
        model: `name` and `args` of the network.
        net: the network without weights, on the meta device.
        reset_head: whether the classifier's tensors are zeros.
        weights: which state dict of the file (`vitrim.model.reading.read_weights`).
        layout: the name of the layout of its keys; None: found.

    Raises:
        ConfigError: the file is damaged, or does not fit.
    """
    where = f"model.checkpoint={checkpoint}"
    if checkpoint.lower().endswith(ARRAYS):
        state = from_arrays(Path(checkpoint), net, where=where)
    else:
        found = read(checkpoint, weights)
        state = _as_timm(found, model, net, _source(checkpoint), layout=layout, where=where)
    if reset_head:
        state = _with_zero_head(net, state)
    return _checked(state, net, where=where)


def fitted(
    state: Mapping[str, Tensor], model: Mapping[str, object], net: nn.Module, *, where: str
) -> dict[str, Tensor]:
    """Return tensors in any known layout as timm loads them into `net`, in float32.

    Args:
        state: the tensors.
        model: `name` and `args` of the network.
        net: the network without weights, on the meta device.
        where: where the tensors are from, for messages.

    Raises:
        ConfigError: they do not fit.
    """
    return _checked(
        _as_timm(dict(state), model, net, {}, layout=None, where=where), net, where=where
    )


def read(checkpoint: str, weights: str | None) -> dict[str, Tensor]:
    """Return the tensors of the file, checked against its manifest if it has one.

    Raises:
        ConfigError: it is missing or damaged, or has no such weights.
    """
    try:
        return read_weights(file_of(checkpoint), weights)
    except StoreError as error:
        raise ConfigError(f"model.checkpoint={checkpoint}: {error}") from None


def _as_timm(
    state: dict[str, Tensor],
    model: Mapping[str, object],
    net: nn.Module,
    source: Mapping[str, object],
    *,
    layout: str | None,
    where: str,
) -> dict[str, Tensor]:
    """Return tensors by the names of `net`: without prefixes, and from the layout they have."""
    expected = net.state_dict()
    bare = {name: _single(tensor) for name, tensor in unwrapped(state, expected).items()}
    found = layout_of(bare) if layout is None else NAMES[layout]
    if found is not None:
        lacking = found.missing(bare)
        if lacking:
            raise ConfigError(f"{where}: not in the layout {found.name}: no {', '.join(lacking)}")
        _log.debug("%s: in the layout %s", where, found.name)
        bare = found.to_timm(bare, expected.keys())
    result = converted(bare, model, net, source)
    if len(result.keys() & expected.keys()) < _KNOWN * len(expected) and found is None:
        raise ConfigError(
            f"{where} does not fit {model['name']}, and its keys ({', '.join([*state][:3])}, ...) "
            f"are of no known layout; the nearest are {nearest(bare)}"
        )
    return result


def unwrapped(state: Mapping[str, Tensor], expected: Mapping[str, object]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of modules around the network.

    Other tensors of those modules, such as a loss's, are left out; classifiers beside a backbone
    are kept. A prefix that the network has itself stays.

    >>> unwrapped({"module.net.a": Tensor(), "module.loss.b": Tensor(), "c": Tensor()}, {}).keys()
    dict_keys(['a'])
    """
    state = dict(state)
    prefix = _wrapper(state, expected)
    while prefix:
        inside = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        beside = {k: t for k, t in state.items() if k in expected or k.startswith(_HEADS)}
        state = beside | inside
        prefix = _wrapper(state, expected)
    return state


def _wrapper(state: Mapping[str, Tensor], expected: Mapping[str, object]) -> str:
    """Return the prefix that at least half of the tensors have; "" if there is none.

    Layouts of other libraries have some of these prefixes themselves.
    """
    if layout_of(state) is not None:
        return ""
    for prefix in _WRAPPERS:
        if any(name.startswith(prefix) for name in expected):
            continue
        if 2 * sum(name.startswith(prefix) for name in state) >= max(1, len(state)):
            return prefix
    return ""


def _checked(state: Mapping[str, Tensor], net: nn.Module, *, where: str) -> dict[str, Tensor]:
    """Return the tensors in float32, if they are those of `net` and finite."""
    state = _counters(net) | dict(state)
    problems = mismatches(net, state)
    if problems:
        raise ConfigError(
            f"{where} does not fit this model with {net.num_classes} "
            f"classes: {'; '.join(problems[:3])}; model.num_classes sets the number of classes, "
            "model.reset_head=true ignores the checkpoint's head"
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{where}: {name} is not finite, the file is damaged")
    return state


def _source(checkpoint: str) -> Mapping[str, object]:
    """Return the arguments of the network that vitrim saved the file from, if it did."""
    path = file_of(checkpoint)
    if path.name != WEIGHTS or not (path.parent / PLAN).is_file():
        return {}
    try:
        args = loads(read_text(path.parent / PLAN, MAX_BYTES)).model.get("args")
    except (StoreError, PlanError) as error:
        raise ConfigError(f"model.checkpoint={checkpoint}: {error}") from None
    return args if isinstance(args, Mapping) else {}


def _single(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, in float32 if it has any floating-point type."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _counters(net: nn.Module) -> dict[str, Tensor]:
    """Return zeros for the batch counters of norms, which older checkpoints do not contain."""
    return {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in net.named_buffers()
        if name.endswith(".num_batches_tracked")
    }


def _with_zero_head(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with zeros for the classifier's tensors, to be trained."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(_CLASSIFIERS)}
    zeros = {
        name: torch.zeros(tensor.shape)
        for name, tensor in net.state_dict().items()
        if name.startswith(_CLASSIFIERS)
    }
    return kept | zeros
