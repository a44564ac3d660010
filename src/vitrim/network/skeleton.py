"""Networks without weights, on the meta device: the dense and the compact network of a plan."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from vitrim.network.dispatch import UnsupportedArchitecture
from vitrim.network.surgery import cut_
from vitrim.plan import Plan, PlanError

# limits of arguments that are passed to timm
_MAX_VALUES, _MAX_TEXT, _MAX_NUMBER, _MAX_REPEATS = 1000, 256, 2**16, 1000
_MAX_MODULES, _MAX_ELEMENTS = 5000, 2**33
_MAX_SHARED = 4
_LOADING = inspect.signature(timm.create_model).parameters.keys() - {"kwargs"}
"""Arguments of timm's factory itself: the source of the weights, which a plan must not state."""

_shared: dict[str, nn.Module] = {}


def skeleton(plan: Plan) -> nn.Module:
    """Return the compact network of `plan` without weights, on the meta device."""
    return cut_(dense_skeleton(plan.model), plan)


def shared_skeleton(model: Mapping[str, object]) -> nn.Module:
    """Return what `dense_skeleton` does, built once: for callers that do not modify the network.

    Raises:
        PlanError: as `dense_skeleton`.
    """
    key = repr(model)
    if key not in _shared:
        net = dense_skeleton(model)
        while len(_shared) >= _MAX_SHARED:
            del _shared[next(iter(_shared))]
        _shared[key] = net
    return _shared[key]


def outline(net: nn.Module) -> tuple[list[object], list[object]]:
    """Return the types of all modules and the shapes of all parameters, by name."""
    modules = [(name, type(module)) for name, module in net.named_modules()]
    return [*modules], [(name, value.shape) for name, value in net.named_parameters()]


def dense_skeleton(model: Mapping[str, object]) -> nn.Module:
    """Return the dense network of timm.create_model's `name` and `args`, without weights.

    Raises:
        PlanError: timm has no such network; or `args` would load weights, do not fit the network,
            or make it larger than any real one.
        UnsupportedArchitecture: the name is of no dense network.
    """
    if set(model) != {"name", "args"} or not isinstance(model["args"], dict):
        raise PlanError(f"plan.model has the keys {sorted(model)}: expected name and args")
    name, args = model["name"], model["args"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise PlanError(f"plan.model.name={name!r}: timm {timm.__version__} has no such model")
    loading = sorted(args.keys() & _LOADING)
    if loading:
        raise PlanError(f"plan.model.args: {', '.join(loading)} are not allowed")
    _check_values(args)
    try:
        with on_meta(), _size_limit():
            net: nn.Module = timm.create_model(name, pretrained=False, **args)
    except UnsupportedArchitecture:
        raise
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


def _check_values(args: Mapping[str, object]) -> None:
    """Raise PlanError for an argument that is larger than that of any real network."""
    values = [
        (_MAX_REPEATS if "depth" in name or "layers" in name else _MAX_NUMBER, value)
        for name, value in args.items()
    ]
    for limit, value in values:  # the loop appends the contents of containers
        match value:
            case dict():
                values += [(limit, part) for pair in value.items() for part in pair]
            case list() | tuple():
                values += [(limit, part) for part in value]
            case str() if len(value) <= _MAX_TEXT:
                pass
            case None | bool():
                pass
            case int() | float() if abs(value) <= limit:
                pass
            case _:
                raise PlanError(
                    f"plan.model.args: {reprlib.repr(value)}: expected numbers up to {limit:,}, "
                    f"strings up to {_MAX_TEXT} characters, and lists of them"
                )
        if len(values) > _MAX_VALUES:
            raise PlanError(f"plan.model.args: expected at most {_MAX_VALUES} values")


@contextmanager
def _size_limit() -> Iterator[None]:
    """Raise ValueError when a network gets more modules or elements than any real one has."""
    modules = elements = 0

    def count(owner: nn.Module, name: str, part: object) -> None:
        nonlocal modules, elements
        modules += isinstance(part, nn.Module)
        elements += part.numel() if isinstance(part, Tensor) else 0
        if modules > _MAX_MODULES or elements > _MAX_ELEMENTS:
            raise ValueError(
                f"it has more than {_MAX_MODULES:,} modules or {_MAX_ELEMENTS:,} elements"
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
    """Skip the random initialisation of meta tensors, which takes half of a skeleton's time.

    `linspace` stays on the CPU, because timm 1.0.19 and 1.0.20 read drop path rates from it.
    """

    # kaiming_uniform_ as a whole: the mode does not see the calls inside
    _FILLS = frozenset(
        (
            "uniform_",
            "normal_",
            "erfinv_",
            "mul_",
            "add_",
            "clamp_",
            "zero_",
            "fill_",
            "copy_",
            "kaiming_uniform_",
        )
    )

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        filled = args[0] if args else kwargs.get("tensor")
        if func.__name__ in self._FILLS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)
