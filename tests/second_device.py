"""A second device without hardware: its tensors are kept on the CPU and say that they are not.

Products and decompositions are recorded with the device of their operands. As on real hardware, an
operation refuses operands of two devices, and numpy cannot read tensors of the second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("lazy", 0)  # no kernels, but PyTorch has it as a type in every build
CPU = torch.device("cpu")

_MOVES = ("_to_copy", "copy_")
_CHEAP = ("norm", "check_errors")
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "cholesky_solve", "_cholesky_solve_helper")


class Product(NamedTuple):
    """A product or decomposition: its name, its smallest dimension, where it was computed."""

    name: str
    size: int
    device: torch.device


class _Far(Tensor):
    """A tensor of the second device, whose numbers are those of `near`."""

    near: Tensor

    @staticmethod
    def __new__(cls: Any, near: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=SECOND,
        )

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def tolist(self) -> Any:
        return self.near.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of the second device to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Within this mode there is a device `SECOND`; `products` lists what is computed where."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.fails = False
        """Whether the second device has no memory for any product."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS or ("linalg_" in name and not name.endswith(_CHEAP)):
            operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            size = min(min(each.shape[-2:]) for each in operands if each.ndim > 1)
            self.products.append(Product(name, size, operands[0].device))
            if self.fails and operands[0].device == SECOND:
                raise torch.OutOfMemoryError("the second device has no memory")
        return _compute(func, args, kwargs or {})

    def of(self, least: int, device: torch.device) -> list[Product]:
        """Return what `device` computed with at least `least` rows and columns."""
        return [each for each in self.products if each.size >= least and each.device == device]


def _compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [isinstance(leaf, _Far) for leaf in leaves if leaf.ndim or isinstance(leaf, _Far)]
    name = func.overloadpacket.__name__
    if name not in _MOVES and any(far) and not all(far):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    asked = kwargs.get("device")
    to_second = any(far[:1]) if asked is None else torch.device(asked).type == SECOND.type
    out = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    return tree_map(_as_far, out) if to_second else out


def _near(leaf: Any) -> Any:
    if isinstance(leaf, _Far):
        return leaf.near
    return CPU if isinstance(leaf, torch.device) and leaf.type == SECOND.type else leaf


def _as_far(leaf: Any) -> Any:
    return _Far(leaf) if isinstance(leaf, Tensor) else leaf
