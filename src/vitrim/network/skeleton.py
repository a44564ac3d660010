"""Networks without weights, on the meta device: the dense one of a plan, and its compact one."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from vitrim.network.surgery import carve
from vitrim.plan import Plan, PlanError

_MAX_VALUES, _MAX_TEXT, _MAX_NUMBER, _MAX_REPEATS = 1000, 256, 2**16, 1000  # for timm to build
_MAX_MODULES, _MAX_ELEMENTS = 5000, 2**33
_LOADING = inspect.signature(timm.create_model).parameters.keys() - {"kwargs"}
"""Arguments of timm's factory itself: where weights come from, which a plan must not say."""


def skeleton(plan: Plan) -> nn.Module:
    """Return the compact network of `plan` without weights, on the meta device."""
    return carve(dense_skeleton(plan.model), plan)


def dense_skeleton(model: Mapping[str, Any]) -> nn.Module:
    """Return the dense network of timm.create_model's `name` and `args`, without weights.

    Raises:
        PlanError: timm knows no such network, or `args` would load something, do not fit it, or
            make a network beyond all sense.
    """
    if set(model) != {"name", "args"} or not isinstance(model["args"], dict):
        raise PlanError(f"plan.model has the keys {sorted(model)}: expected name and args")
    name, args = model["name"], model["args"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise PlanError(f"plan.model.name={name!r}: timm {timm.__version__} has no such model")
    loading = sorted(args.keys() & _LOADING)
    if loading:
        raise PlanError(f"plan.model.args: {', '.join(loading)} may not stand there")
    _check_values(args)
    try:
        with on_meta(), _bounded():
            net: nn.Module = timm.create_model(name, pretrained=False, **args)
    except (
        TypeError,
        ValueError,
        AssertionError,
        AttributeError,
        ArithmeticError,
        LookupError,
        RuntimeError,
    ) as e:
        reason = str(e).partition("\n")[0][:_MAX_TEXT]
        raise PlanError(f"{name} with args={args}: timm cannot build it ({reason})") from None
    return net


def _check_values(args: Mapping[str, Any]) -> None:
    """Raise PlanError where an argument is larger than that of any network."""
    values = [
        (_MAX_REPEATS if "depth" in name or "layers" in name else _MAX_NUMBER, value)
        for name, value in args.items()
    ]
    for most, value in values:  # which grows
        match value:
            case dict():
                values += [(most, part) for pair in value.items() for part in pair]
            case list() | tuple():
                values += [(most, part) for part in value]
            case str() if len(value) <= _MAX_TEXT:
                pass
            case None | bool():
                pass
            case int() | float() if abs(value) <= most:
                pass
            case _:
                raise PlanError(
                    f"plan.model.args: {reprlib.repr(value)}: expected numbers up to {most:,}, "
                    f"words up to {_MAX_TEXT} characters, and lists of them"
                )
        if len(values) > _MAX_VALUES:
            raise PlanError(f"plan.model.args: expected at most {_MAX_VALUES} values")


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop the building of a network with more modules or numbers than any has."""
    modules = elements = 0

    def count(owner: nn.Module, name: str, part: object) -> None:
        nonlocal modules, elements
        modules += isinstance(part, nn.Module)
        elements += part.numel() if isinstance(part, Tensor) else 0
        if modules > _MAX_MODULES or elements > _MAX_ELEMENTS:
            raise ValueError(
                f"it has more than {_MAX_MODULES:,} modules or {_MAX_ELEMENTS:,} numbers"
            )

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def on_meta() -> Iterator[None]:
    """Build networks of timm in this context without memory and without random numbers."""
    with torch.device("meta"), _WithoutInit():
        yield


class _WithoutInit(TorchFunctionMode):
    """Skip the random initialisation of tensors that have no memory: half of a skeleton's time.

    The drop path rates that timm 1.0.19 and 1.0.20 read out of a tensor have memory.
    """

    _FILLS = frozenset(
        ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_")
    )
    _FILLS |= {
        "copy_",
        "kaiming_uniform_",
    }  # the latter whole: its inside is out of this mode's sight

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        filled = args[0] if args else kwargs.get("tensor")
        if func.__name__ in self._FILLS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)
