"""A Linear whose weight is int8, and the rounding that leads to it.

Annotations are evaluated here, because TorchScript reads no strings.
"""

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

    __jit_unused_properties__ = ("weight",)

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


_EXACT = 2**24 // LEVELS**2
"""Columns of int8 matrices whose products in float32 are exact whatever the order of sums."""


def integer_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x W^T in `dtype`, rounded once, for whole numbers x (..., in) and an int8 W (out, in).

    Float32 products of up to 1040 columns are exact. More columns are multiplied in parts, whose
    sums are added in float64.
    """
    x, weight = x.float(), weight.float()
    columns = weight.shape[1]
    if columns <= _EXACT:
        return F.linear(x, weight).to(dtype)
    total = F.linear(x[..., :_EXACT], weight[:, :_EXACT]).double()
    for start in range(_EXACT, columns, _EXACT):
        part = slice(start, start + _EXACT)
        total = total + F.linear(x[..., part], weight[:, part])
    return total.to(dtype)
