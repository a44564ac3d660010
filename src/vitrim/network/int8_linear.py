"""A Linear whose weight is int8, and the rounding that leads to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 127
"""The largest integer of a row: int8 is used symmetrically, from -127 to 127."""


class Int8Linear(nn.Module):
    """A Linear with an int8 weight (out, in) and one float32 scale per row, (out,).

    The weight is symmetric: `weight_int8 * scale[:, None]`. With `dynamic`, each input vector is
    rounded in the same way at run time, with a scale of its own, and the product is one of
    integers; otherwise the input stays in float. The bias is in float.
    """

    if TYPE_CHECKING:
        scale: Tensor

    def __init__(
        self,
        *,
        weight_int8: Tensor,
        scale: Tensor,
        bias: nn.Parameter | None,
        dynamic: bool,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_int8.shape
        self.dynamic = dynamic
        self.weight_int8 = nn.Parameter(weight_int8, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The weight in float, (out, in): what code that expects a Linear reads."""
        return self.weight_int8.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        scale = self.scale.to(input.dtype)
        if not self.dynamic:
            weight = self.weight_int8.to(input.dtype) * scale[:, None]
            return F.linear(input, weight, self.bias)
        integers, scale_of_vector = rounded(input)
        output = integer_product(integers, self.weight_int8, input.dtype) * scale_of_vector * scale
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Show the widths, and whether inputs are int8 as well."""
        return f"in={self.in_features}, out={self.out_features}, dynamic={self.dynamic}"


def to_int8(module: nn.Module, *, dynamic: bool) -> nn.Module:
    """Return `module` with an Int8Linear in place of each Linear that it is or consists of.

    A layer that consists of several is changed in place.
    """
    if type(module) is nn.Linear:
        integers, scale = rounded(module.weight.detach().float())
        layer = Int8Linear(
            weight_int8=integers.to(torch.int8),
            scale=scale[:, 0].contiguous(),
            bias=module.bias,
            dynamic=dynamic,
        )
        return layer.train(module.training)
    for name, child in [*module.named_children()]:
        setattr(module, name, to_int8(child, dynamic=dynamic))
    return module


def fake_int8(weight: Tensor) -> Tensor:
    """Return the values that `weight` (out, in) has after rounding to int8, in its own dtype."""
    integers, scale = rounded(weight.float())
    return integers.to(weight.dtype) * scale.to(weight.dtype)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers from -127 to 127, in the dtype of `x`, and the scale of every row.

    The scale, (..., 1), is the largest magnitude of the row over 127; 1 for a row of zeros.
    """
    scale = x.abs().amax(-1, keepdim=True) / LEVELS
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).round().clamp(-LEVELS, LEVELS), scale


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a fast kernel for this int8 product: with VNNI or AMX, or on a GPU.

    On a GPU it needs more than 16 rows, and widths that are multiples of 8. Graphs that are
    exported or compiled do without it.
    """
    if torch.compiler.is_compiling():
        return False
    match x.device.type:
        case "cpu":
            return torch.cpu._is_vnni_supported()
        case "cuda":
            rows = x.numel() // x.shape[-1]
            return rows > 16 and all(width % 8 == 0 for width in weight.shape)
    return False


_EXACT = 2**24 // LEVELS**2
"""Columns of int8 matrices whose products in float32 are exact whatever the order of sums."""


def integer_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x W^T in `dtype`, rounded once, for whole numbers x (..., in) and an int8 W (out, in).

    The result is the same on every device. Where there is a fast kernel it is used. Elsewhere
    products are in float32, which is exact for up to 1040 columns; more are multiplied in parts,
    whose sums are added in float64.
    """
    product = _kernel(x, weight) if has_kernel(x, weight) else _in_float(x.float(), weight.float())
    return product.to(dtype)


def _kernel(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.to(torch.int8).reshape(-1, weight.shape[1])
    if rows.shape[1] == 1:  # with AMX, torch 2.14 gives wrong products of one column
        rows, weight = F.pad(rows, (0, 1)), F.pad(weight, (0, 1))
    product: Tensor = torch._int_mm(rows, weight.t())
    return product.reshape([*x.shape[:-1], len(weight)])


def _in_float(x: Tensor, weight: Tensor) -> Tensor:
    columns = weight.shape[1]
    if columns <= _EXACT:
        return F.linear(x, weight)
    total = F.linear(x[..., :_EXACT], weight[:, :_EXACT]).double()
    for start in range(_EXACT, columns, _EXACT):
        end = start + _EXACT
        total = total + F.linear(x[..., start:end], weight[:, start:end])
    return total
