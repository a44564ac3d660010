"""Mean and covariance of activations, gathered in one pass in memory that no image count changes.

Every batch is centred on its own mean, multiplied in float32, and merged into float64 sums by the
update of Chan, Golub and LeVeque (1979): what is far from zero loses no digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError


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

    def __init__(self, name: str, channels: int, groups: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(*groups, channels, dtype=torch.float64))
        self.register_buffer("cov", torch.empty(0))
        self._scatter: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Take in `rows` of shape (groups, n, channels), row i counting `weights[i]` times.

        Raises:
            MomentsError: a number is not finite; the layer is named.
        """
        rows, weights = rows.float(), weights.float()
        total = weights.sum(dtype=torch.float64)
        share = (weights / total).float()[:, None]
        mean = (rows * share).sum(-2, dtype=torch.float64)
        centred = (rows - mean.float().unsqueeze(-2)) * weights.sqrt()[:, None]
        scatter = (centred.mT @ centred).double()
        if not bool(torch.isfinite(scatter.diagonal(dim1=-2, dim2=-1)).all()):
            raise MomentsError(
                f"{self.name}: its activations are not finite (or overflow float32) on a "
                "calibration batch; look at the images and the weights"
            )
        # the mean was subtracted in float32: what that left over belongs to the mean
        rest = (centred * weights.sqrt()[:, None]).sum(-2, dtype=torch.float64) / total
        self._merge(total, mean.float().double() + rest, scatter)

    def _merge(self, total: Tensor, mean: Tensor, scatter: Tensor) -> None:
        if self._scatter is None:
            self._scatter = torch.zeros_like(scatter)
        self.weight, self.mean = self.weight.to(mean.device), self.mean.to(mean.device)
        step = mean - self.mean
        whole = self.weight + total
        outer = step.unsqueeze(-1) * step.unsqueeze(-2)
        self._scatter += scatter.addcmul_(outer, self.weight * total / whole)
        self.mean = self.mean + step * (total / whole)
        self.weight = whole

    def finish(self) -> None:
        """Make `cov` of what was taken in; safe to call twice.

        Raises:
            MomentsError: nothing was.
        """
        if self._scatter is None:
            if not self.cov.numel():
                raise MomentsError(f"{self.name}: no activations, for want of calibration images")
            return
        self.cov = (self._scatter / self.weight).float().cpu()
        self.mean, self.weight = self.mean.cpu(), self.weight.cpu()
        self._scatter = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the finished moments by name."""
        return {"weight": self.weight, "mean": self.mean, "cov": self.cov}
