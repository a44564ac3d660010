"""Checkpoints of dense networks: safetensors files in timm's key layout, or folders of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.files import MANIFEST, PLAN, WEIGHTS, StoreError, read_text, sha256, verify
from vitrim.model.conversion import converted
from vitrim.plan import MAX_BYTES, PlanError, loads
from vitrim.store import mismatches, read_tensors

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # a scheme; one letter is a drive
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".tar", ".zip")
_CLASSIFIERS = ("head.", "head_dist.", "linear_head.", "fc.", "classifier.")


def check_path(checkpoint: str) -> None:
    """Refuse an address, and file types that can run code when they are read.

    Raises:
        ConfigError: `checkpoint` is one of them.
    """
    if _ADDRESS.match(checkpoint):
        raise ConfigError(
            f"model.checkpoint={checkpoint}: an address; download the file yourself, set its path, "
            "and set model.sha256 to its SHA-256"
        )
    if checkpoint.lower().endswith(_PICKLES) and not Path(checkpoint).is_dir():
        raise ConfigError(
            f"model.checkpoint={checkpoint}: a file type that can contain a pickle, which can run "
            "code: expected a .safetensors file, or a run folder"
        )


def fingerprint_of(checkpoint: str, expected: str | None) -> str:
    """Return the SHA-256 of the checkpoint.

    Raises:
        ConfigError: there is no such file, or its SHA-256 is not the expected one.
    """
    path = _file_of(checkpoint)
    if not path.is_file():
        raise ConfigError(f"model.checkpoint={checkpoint}: no such file")
    digest = sha256(path)
    if expected not in (None, digest):
        raise ConfigError(
            f"model.checkpoint={checkpoint}: its SHA-256 is {digest}, model.sha256 "
            f"expects {expected}: the file is damaged, or another one"
        )
    return digest


def dtypes_of(checkpoint: str) -> str:
    """Return the floating-point types of the checkpoint's tensors, joined by commas.

    Raises:
        ConfigError: the file is damaged.
    """
    dtypes = {
        str(tensor.dtype).removeprefix("torch.")
        for tensor in _read(checkpoint).values()
        if tensor.is_floating_point()
    }
    return ", ".join(sorted(dtypes))


def read_checkpoint(
    checkpoint: str, model: Mapping[str, object], net: nn.Module, *, reset_head: bool
) -> dict[str, Tensor]:
    """Return the checkpoint's tensors as timm loads them into `net`, in float32.

    Args:
        checkpoint: the file, or the folder that holds it.
        model: `name` and `args` of the network.
        net: the network without weights, on the meta device.
        reset_head: whether the classifier's tensors are zeros.

    Raises:
        ConfigError: the file is damaged, or does not fit.
    """
    state = converted(_read(checkpoint), model, net, _source(checkpoint))
    state = _counters(net) | {name: _single(tensor) for name, tensor in state.items()}
    if reset_head:
        state = _with_zero_head(net, state)
    problems = mismatches(net, state)
    if problems:
        raise ConfigError(
            f"model.checkpoint={checkpoint} does not fit this model with {net.num_classes} "
            f"classes: {'; '.join(problems[:3])}; model.num_classes sets the number of classes, "
            "model.reset_head=true ignores the checkpoint's head"
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(
                f"model.checkpoint={checkpoint}: {name} is not finite, the file is damaged"
            )
    return state


def _read(checkpoint: str) -> dict[str, Tensor]:
    """Return the tensors of the file, checked against its manifest if it has one."""
    path = _file_of(checkpoint)
    try:
        if (path.parent / MANIFEST).is_file() and path.name == WEIGHTS:
            verify(path.parent, (WEIGHTS,))
        return read_tensors(path)
    except StoreError as error:
        raise ConfigError(f"model.checkpoint={checkpoint}: {error}") from None


def _source(checkpoint: str) -> Mapping[str, object]:
    """Return the arguments of the network that vitrim saved the file from, if it did."""
    path = _file_of(checkpoint)
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


def _file_of(checkpoint: str) -> Path:
    path = Path(checkpoint)
    return path / WEIGHTS if path.is_dir() else path


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
