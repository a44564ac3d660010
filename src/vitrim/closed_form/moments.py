"""Mean and covariance of activations, gathered in one pass; memory does not grow with the images.

The first batch's mean is subtracted from all rows; products are computed in float32 and summed in
float64, also within autocast. Activations far from zero lose no digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError

MomentTensors = Mapping[str, Mapping[str, Tensor]]
"""Finished moments of layers or sites: the name of a layer or site -> tensors by name."""

_BLOCK = 256  # columns of one product


class MomentsError(VitrimError):
    """Activations whose moments are missing or not finite."""


class Moments(nn.Module):
    """Weighted moments of rows with `channels` elements, one set for each of `groups`.

    `weight` is the sum of the weights, `mean` has the shape (groups, channels), `cov` (groups,
    channels, channels), both without `groups` where there are none. `cov` is empty until `finish`
    computes it, in float32.
    """

    weight: Tensor
    mean: Tensor
    cov: Tensor
    _sum: Tensor
    _squares: list[Tensor]  # of each block of rows, the columns from its first one on

    def __init__(self, name: str, channels: int, groups: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(*groups, channels, dtype=torch.float64))
        self.register_buffer("cov", torch.empty(0))
        self._shift: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Add `rows` of shape (groups, n, channels), row i with weight `weights[i]`.

        Raises:
            MomentsError: an activation of the first batch is not finite; the message names the
                layer. Later batches are checked by `finish`: a read here waits for the device.
        """
        with full_precision(rows):
            self._add(rows.float(), weights.float())

    def _add(self, rows: Tensor, weights: Tensor) -> None:
        root = weights.sqrt()[:, None]
        is_first = self._shift is None
        if self._shift is None:
            self._shift = (rows * root.square()).sum(-2) / root.square().sum()
            groups, channels = self._shift.shape[:-1], self._shift.shape[-1]
            self._sum = rows.new_zeros(*groups, channels, dtype=torch.float64)
            self._squares = [
                rows.new_zeros(*groups, len(block), channels - block.start, dtype=torch.float64)
                for block in _blocks(channels)
            ]
            self.weight = self.weight.to(rows.device)
        centred = (rows - self._shift.unsqueeze(-2)) * root
        blocks = zip(self._squares, _blocks(centred.shape[-1]), strict=True)
        for squares, block in blocks:  # the upper triangle; it is symmetric
            part = centred[..., block.start : block.stop]
            squares.add_(part.mT @ centred[..., block.start :])
        if is_first:
            self._check()
        self._sum += (centred * root).sum(-2, dtype=torch.float64)
        self.weight = self.weight + weights.sum(dtype=torch.float64)

    def finish(self) -> None:
        """Compute `mean` and `cov` from the added rows; safe to call twice.

        Raises:
            MomentsError: no rows were added, or an activation is not finite.
        """
        if self._shift is None:
            if not self.cov.numel():
                raise MomentsError(
                    f"{self.name}: no activations, because there were no calibration images"
                )
            return
        self._check()
        step = self._sum / self.weight
        outer = step.unsqueeze(-1) * step.unsqueeze(-2)
        upper = torch.zeros_like(outer)
        for squares, block in zip(self._squares, _blocks(step.shape[-1]), strict=True):
            upper[..., block.start : block.stop, block.start :] = squares / self.weight
        upper.triu_()
        second_moment = upper + upper.triu(1).mT
        self.cov = (second_moment - outer).float().cpu()
        self.mean = (self._shift.double() + step).cpu()
        self.weight = self.weight.cpu()
        self._shift = None
        del self._sum, self._squares  # together about as large as the finished moments

    def _check(self) -> None:
        variances = torch.cat([each.diagonal(dim1=-2, dim2=-1) for each in self._squares], dim=-1)
        if not bool(torch.isfinite(variances).all()):
            raise MomentsError(
                f"{self.name}: its activations are not finite (or overflow float32) on a "
                "calibration batch; check the images and the weights"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return the finished moments by name."""
        return {"weight": self.weight, "mean": self.mean, "cov": self.cov}


def _blocks(channels: int) -> list[range]:
    """Return the channels in blocks: each is multiplied by the channels from its first one on."""
    return [range(start, min(start + _BLOCK, channels)) for start in range(0, channels, _BLOCK)]


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast, which rounds the factors of products to half precision.

    Statistics are neither computed from rounded numbers nor rounded themselves.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def key_of(name: str) -> str:
    """Return the key of a buffer or submodule for a dotted name: keys must not contain dots.

    >>> key_of("blocks.0.mlp.fc1")
    'blocks/0/mlp/fc1'
    """
    return name.replace(".", "/")


def add_to(module: nn.Module, name: str, part: Tensor) -> None:
    """Add `part`, in float64, to the buffer of that name, which is empty at first."""
    total = module.get_buffer(key_of(name))
    if total.numel():
        module.register_buffer(key_of(name), total.to(part.device).add_(part))
    else:
        module.register_buffer(key_of(name), part.to(torch.float64, copy=True))
