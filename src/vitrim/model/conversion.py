"""timm's own conversion of checkpoints: other layouts, image and patch sizes, channels, prefixes.

timm chooses the conversion of a network where it builds it, and applies it to pretrained weights
only. Here the choice is recorded while a network is built on the meta device, and the conversion is
then applied to the tensors of any file, as `timm.create_model(name, pretrained=True,
pretrained_cfg_overlay={"file": ...})` does.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import _builder, clean_state_dict, load_pretrained
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.network.skeleton import on_meta

State = dict[str, Tensor]
_FAILURES = (
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
    ArithmeticError,
    LookupError,
    RuntimeError,
)
"""What timm's conversions raise for tensors of another network."""
_MAX_KNOWN = 4
_LOADED_BY_TIMM = ("timm.", "vitrim.network.family.vit_norm_eps")
"""Modules whose networks get their weights from timm's builder."""
_MAX_ARRAYS = 2**35  # bytes of an .npz, unpacked


@dataclass(frozen=True, kw_only=True, slots=True)
class _Conversion:
    """What timm does with pretrained weights of a network.

    `filter_fn` maps a state dict and the network to a state dict; `in_chans` are the channels of
    the images; without `strict` tensors that the network lacks are ignored.
    """

    config: Mapping[str, object]
    filter_fn: Callable[..., State] | None
    in_chans: int
    strict: bool


_known: dict[str, _Conversion | None] = {}


def converted(
    state: State, model: Mapping[str, object], net: nn.Module, source: Mapping[str, object]
) -> State:
    """Return the tensors that timm would load into `net` from a file with the tensors `state`.

    Tensors that timm cannot convert, because they belong to another network, are returned as they
    are.

    Args:
        state: the tensors of the file; the prefixes of DDP and torch.compile are removed.
        model: `name` and `args` of the network.
        net: the network without weights, on the meta device; it is not modified.
        source: arguments of the network that the file was saved from, as far as they are known.
    """
    state = clean_state_dict(state)
    conversion = _conversion(model)
    if conversion is None or not state:  # timm would download weights in place of none
        return state
    twin, taken = copy.copy(net), {}

    def take(tensors: State, strict: bool = True) -> nn.modules.module._IncompatibleKeys:
        known = net.state_dict().keys()
        taken.update({k: tensor for k, tensor in tensors.items() if strict or k in known})
        return nn.modules.module._IncompatibleKeys([], [])

    twin.load_state_dict = take  # type: ignore[assignment, method-assign]
    twin.pretrained_model_args = dict(source)  # type: ignore[assignment]
    overlay = {"state_dict": dict(state), "num_classes": net.num_classes, "label_offset": 0}
    try:
        load_pretrained(
            twin,
            pretrained_cfg={**conversion.config, **overlay},
            num_classes=net.num_classes,
            in_chans=conversion.in_chans,
            filter_fn=conversion.filter_fn,
            strict=conversion.strict,
        )
    except _FAILURES:
        return state
    return taken


def from_arrays(path: Path, net: nn.Module, *, where: str) -> State:
    """Return the tensors that timm loads into `net` from an .npz file of JAX's networks.

    Tensors that the file does not have are left out.

    Args:
        path: the file, as AugReg's; arrays of objects are refused by NumPy.
        net: the network without weights, on the meta device; it is not modified.
        where: the file, for messages.

    Raises:
        ConfigError: timm reads no such file for this network, or it is damaged.
    """
    load = getattr(type(net), "load_pretrained", None)
    if load is None:
        raise ConfigError(f"{where}: timm reads no .npz file into a {type(net).__name__}")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{where}: no .npz file, or a damaged one ({error})") from None
    if size > _MAX_ARRAYS:
        raise ConfigError(f"{where}: {size:,} bytes unpacked: expected at most {_MAX_ARRAYS:,}")
    twin = copy.deepcopy(net).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    try:
        load(twin, str(path))
    except (*_FAILURES, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: timm cannot load it into this network ({reason})") from None
    return {k: t for k, t in twin.state_dict().items() if not bool(t.isnan().all())}


def _conversion(model: Mapping[str, object]) -> _Conversion | None:
    """Return the conversion of a network, recorded once; None where there is none."""
    key = repr(model)
    if key not in _known:
        while len(_known) >= _MAX_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = _recorded_conversion(str(model["name"]), model["args"])
    return _known[key]


def _recorded_conversion(name: str, args: object) -> _Conversion | None:
    assert isinstance(args, Mapping)
    if not timm.model_entrypoint(name).__module__.startswith(_LOADED_BY_TIMM):
        return None  # a network of vitrim or of the user, which loads its weights itself
    with _recording() as calls, on_meta():
        timm.create_model(name, pretrained=True, **args)
    return calls[0] if calls else None


@contextmanager
def _recording() -> Iterator[list[_Conversion]]:
    """Record how timm would load pretrained weights in this context; nothing is loaded."""
    calls: list[_Conversion] = []

    def record(
        model: nn.Module,
        pretrained_cfg: Mapping[str, object],
        num_classes: int = 1000,
        in_chans: int = 3,
        filter_fn: Callable[..., State] | None = None,
        strict: bool = True,
        **_: object,
    ) -> None:
        calls.append(
            _Conversion(
                config=pretrained_cfg, filter_fn=filter_fn, in_chans=in_chans, strict=strict
            )
        )

    original = _builder.load_pretrained
    _builder.load_pretrained = record
    try:
        yield calls
    finally:
        _builder.load_pretrained = original
