"""Where expensive linear algebra is computed: where its inputs lie, or on the device of a run.

Statistics, weights and plans lie on the CPU. Functions with a cubic cost are marked by `on_device`:
within `computing_on(device)` their inputs are copied to that device, and results back to where the
inputs lay. By default everything is computed where it lies. Results differ by rounding from one
device to another; on one device they are the same every time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_WITHOUT_FLOAT64 = ("mps",)
_device: ContextVar[torch.device | None] = ContextVar("computing_device", default=None)


def computing_device() -> torch.device | None:
    """Return where marked functions compute; None: where their inputs lie."""
    return _device.get()


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Let functions marked by `on_device` compute on `device` within this context.

    Of nested contexts the innermost counts; a new thread starts with none. Within that of a device
    without float64 (MPS), everything is computed where it lies.
    """
    token = _device.set(None if device.type in _WITHOUT_FLOAT64 else device)
    try:
        yield
    finally:
        _device.reset(token)


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` with its tensors on the device of `computing_on`, if there is one.

    Tensors are looked for among arguments and results, in tuples, lists and mappings, too. Results
    return to the device of the first tensor among the arguments. The function may not change its
    arguments. Where the device has too little memory, it is computed where the arguments lie.
    Products are neither autocast nor computed in TF32.
    """

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _device.get()
        home = next((tensor.device for tensor in _tensors((args, kwargs))), None)
        if device is None or home is None or home == device or home.type == "meta":
            return function(*args, **kwargs)
        try:
            with _full_precision(device):
                return _to(function(*_to(args, device), **_to(kwargs, device)), home)
        except torch.OutOfMemoryError:  # the retry is outside: the error holds the tensors
            name = computed.__name__
            _log.warning("%s: too little memory on %s, computed on %s", name, device, home)
        with computing_on(home):
            return function(*args, **kwargs)

    return computed


def _tensors(value: object) -> Iterator[Tensor]:
    """Iterate over the tensors of arguments, in order."""
    match value:
        case Tensor():
            yield value
        case Mapping() | tuple() | list():
            parts: Iterable[object] = value.values() if isinstance(value, Mapping) else value
            for part in parts:
                yield from _tensors(part)


def _to(value: T, device: torch.device) -> T:
    """Return the same with its tensors on a device."""
    moved: object = value
    match value:
        case Tensor():
            moved = value.to(device)
        case Mapping():
            moved = {key: _to(part, device) for key, part in value.items()}
        case tuple() | list():
            parts = [_to(part, device) for part in value]
            kind = type(value)
            moved = kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    return cast(T, moved)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Compute products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    autocast = is_autocast_available(device.type)
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
