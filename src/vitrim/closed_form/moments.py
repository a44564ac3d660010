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
_WAITING = 8  # rows that wait: at most one for as many channels


class MomentsError(VitrimError):
    """Activations whose moments are missing or not finite."""


class Moments(nn.Module):
    """Weighted moments of rows with `channels` elements, one set for each of `groups`.

    `weight` is the sum of the weights, `mean` has the shape (groups, channels), `cov` (groups,
    channels, channels), both without `groups` where there are none. `cov` is empty until `finish`
    computes it, in float32. Until then `shift`, the mean of the first rows, is subtracted from all.
    """

    weight: Tensor
    mean: Tensor
    cov: Tensor
    _sum: Tensor
    _packed: Tensor  # one piece of memory, which is given back when it is freed
    _squares: list[Tensor]  # its parts: of each block of rows, the columns from its first one on

    def __init__(self, name: str, channels: int, groups: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(*groups, channels, dtype=torch.float64))
        self.register_buffer("cov", torch.empty(0))
        self.shift: Tensor | None = None
        self._waiting: list[Tensor] = []

    @torch.no_grad()
    def add(self, rows: Tensor, weights: Tensor, *, wait: bool = False) -> None:
        """Add `rows` of shape (groups, n, channels), row i with weight `weights[i]`.

        Args:
            rows: activations.
            weights: one for each of the n rows.
            wait: whether few rows may wait to be multiplied with the next ones, until `flush`.

        Raises:
            MomentsError: an activation of the first batch is not finite; the message names the
                layer. Later batches are checked by `finish`: a read here waits for the device.
        """
        with full_precision(rows):
            self._add(rows.float(), weights.float(), wait=wait)

    def _add(self, rows: Tensor, weights: Tensor, *, wait: bool) -> None:
        root = weights.sqrt()[:, None]
        is_first = self.shift is None
        if self.shift is None:
            self.shift = (rows * root.square()).sum(-2) / root.square().sum()
            groups, channels = self.shift.shape[:-1], self.shift.shape[-1]
            self._sum = rows.new_zeros(*groups, channels, dtype=torch.float64)
            sizes = [len(block) * (channels - block.start) for block in _blocks(channels)]
            self._packed = rows.new_zeros(*groups, sum(sizes), dtype=torch.float64)
            parts = self._packed.split_with_sizes(sizes, dim=-1)
            self._squares = [
                part.view(*groups, len(block), channels - block.start)
                for part, block in zip(parts, _blocks(channels), strict=True)
            ]
            self.weight = self.weight.to(rows.device)
        centred = (rows - self.shift.unsqueeze(-2)) * root
        self._sum += (centred * root).sum(-2, dtype=torch.float64)
        self.weight = self.weight + weights.sum(dtype=torch.float64)
        most = centred.shape[-1] // _WAITING if wait and not is_first else 0
        if sum(each.shape[-2] for each in self._waiting) + centred.shape[-2] > most:
            self.flush()
        self._waiting.append(centred)
        if centred.shape[-2] > most:
            self.flush()
        if is_first:
            self._check()

    @torch.no_grad()
    def flush(self) -> None:
        """Multiply the rows that wait."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        centred = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=-2)
        blocks = zip(self._squares, _blocks(centred.shape[-1]), strict=True)
        with full_precision(centred):
            for squares, block in blocks:  # the upper triangle; it is symmetric
                part = centred[..., block.start : block.stop]
                squares.add_(part.mT @ centred[..., block.start :])

    def finish(self) -> None:
        """Compute `mean` and `cov` from the added rows; safe to call twice.

        Raises:
            MomentsError: no rows were added, or an activation is not finite.
        """
        if self.shift is None:
            if not self.cov.numel():
                raise MomentsError(
                    f"{self.name}: no activations, because there were no calibration images"
                )
            return
        self.flush()
        self._check()
        step = self._sum / self.weight
        products = step.new_zeros(*step.shape, step.shape[-1])
        for squares, block in zip(self._squares, _blocks(step.shape[-1]), strict=True):
            products[..., block.start : block.stop, block.start :] = squares / self.weight
        del self._packed, self._squares, squares  # about as large as the finished moments
        products.triu_()
        products += products.triu(1).mT
        products -= step.unsqueeze(-1) * step.unsqueeze(-2)
        self.cov = products.float().cpu()
        self.mean = (self.shift.double() + step).cpu()
        self.weight = self.weight.cpu()
        self.shift = None
        del self._sum

    def sums(self) -> list[Tensor]:
        """Return the sums of weights, rows and products, float64; none before `add`."""
        self.flush()
        return [] if self.shift is None else [self.weight, self._sum, self._packed]

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
