"""Mean and covariance of activations, gathered in one pass in memory that no image count changes.

Rows are taken relative to the first batch's mean, multiplied in float32 and added up in float64:
what is far from zero loses no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError

_BLOCK = 256  # columns that are multiplied at once


class MomentsError(VitrimError):
    """Activations that no statistics can be made of."""


class Moments(nn.Module):
    """Weighted moments of rows with `channels` numbers, one set for each of `groups`.

    `weight` is the sum of the weights, `mean` has the shape (groups, channels), `cov` (groups,
    channels, channels), both without `groups` where there are none. `cov` is empty until `finish`
    has made it, in float32.
    """

    weight: Tensor
    mean: Tensor
    cov: Tensor
    _sum: Tensor
    _squares: Tensor

    def __init__(self, name: str, channels: int, groups: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(*groups, channels, dtype=torch.float64))
        self.register_buffer("cov", torch.empty(0))
        self._shift: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Take in `rows` of shape (groups, n, channels), row i counting `weights[i]` times.

        Raises:
            MomentsError: a number is not finite; the layer is named.
        """
        rows, root = rows.float(), weights.float().sqrt()[:, None]
        if self._shift is None:
            self._shift = (rows * root.square()).sum(-2) / root.square().sum()
            groups, channels = self._shift.shape[:-1], self._shift.shape[-1]
            self._sum = rows.new_zeros(*groups, channels, dtype=torch.float64)
            self._squares = rows.new_zeros(*groups, channels, channels, dtype=torch.float64)
            self.weight = self.weight.to(rows.device)
        moved = (rows - self._shift.unsqueeze(-2)) * root
        for at in range(0, moved.shape[-1], _BLOCK):  # the upper half: the other is its mirror
            block = slice(at, at + _BLOCK)
            self._squares[..., block, at:] += moved[..., block].mT @ moved[..., at:]
        if not bool(torch.isfinite(self._squares.diagonal(dim1=-2, dim2=-1)).all()):
            raise MomentsError(
                f"{self.name}: its activations are not finite (or overflow float32) on a "
                "calibration batch; look at the images and the weights"
            )
        self._sum += (moved * root).sum(-2, dtype=torch.float64)
        self.weight = self.weight + weights.sum(dtype=torch.float64)

    def finish(self) -> None:
        """Make `cov` of what was taken in; safe to call twice.

        Raises:
            MomentsError: nothing was.
        """
        if self._shift is None:
            if not self.cov.numel():
                raise MomentsError(f"{self.name}: no activations, for want of calibration images")
            return
        step = self._sum / self.weight
        outer = step.unsqueeze(-1) * step.unsqueeze(-2)
        upper = self._squares.div_(self.weight).triu_()
        whole = upper + upper.triu(1).mT
        self.cov = (whole - outer).float().cpu()
        self.mean = (self._shift.double() + step).cpu()
        self.weight = self.weight.cpu()
        self._shift = None
        del self._sum, self._squares  # as large as all moments together, twice over

    def tensors(self) -> dict[str, Tensor]:
        """Return the finished moments by name."""
        return {"weight": self.weight, "mean": self.mean, "cov": self.cov}


def key_of(name: str) -> str:
    """Return what a buffer or submodule of that name is registered as: no dots are allowed there.

    >>> key_of("blocks.0.mlp.fc1")
    'blocks/0/mlp/fc1'
    """
    return name.replace(".", "/")


def add_to(module: nn.Module, name: str, part: Tensor) -> None:
    """Add `part`, in float64, to the buffer of that name, which is empty at first."""
    held, part = module.get_buffer(key_of(name)), part.double()
    module.register_buffer(key_of(name), held.to(part) + part if held.numel() else part)
