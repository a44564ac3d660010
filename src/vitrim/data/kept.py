"""Few images that stay in memory: prepared once, and handed out again in every epoch and phase."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEPT_BYTES = 2**30
"""What images that are kept may take, in memory and on a device; 1000 of ImageNet take 0.6 GB."""
_SHARE = 8
"""They take at most one part in so many of the free memory of a GPU."""


class KeptImages:
    """Some images and their labels, for whose transform nothing is drawn, in order.

    Batches in order are views of them. Who changes a batch in place would change it for all: this
    is noticed (`check`), and from then on batches are copies.

    Args:
        n: how many images there will be.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.n_filled = 0
        self._parts: list[Tensor] = []  # images and labels
        self._placed: list[Tensor] = []  # the same on a device
        self._versions: list[int] = []  # how often those that are handed out were written to
        self._copies = False

    @torch.inference_mode(False)  # in which it is not counted how often tensors are written to
    def add(self, batch: Sequence[Tensor], first: int) -> None:
        """Take images (B, C, H, W) and their labels (B), from index `first` on, if they are next.

        Nothing is taken where images before them are still missing.
        """
        if first > self.n_filled:
            return
        if not self._parts:
            shapes = [(self.n, *part.shape[1:]) for part in batch]
            self._parts = [
                torch.empty(shape, dtype=part.dtype)
                for shape, part in zip(shapes, batch, strict=True)
            ]
        last = first + len(batch[0])
        for part, more in zip(self._parts, batch, strict=True):
            part[first:last] = more
        self.n_filled = max(self.n_filled, last)
        self._note()

    @torch.inference_mode(False)
    def place(self, device: torch.device) -> None:
        """Copy all images to a device once, if they fit (`KEPT_BYTES`, an eighth of what is free).

        On the CPU, give the memory of the device back.
        """
        if device.type == "cpu":
            self._placed = []
        elif self.n_filled == self.n and not self._placed and _fits(self._parts, device):
            self._placed = [part.to(device) for part in self._parts]
        else:
            return
        self._note()

    def batch(self, index: Sequence[int]) -> list[Tensor]:
        """Return the images at these indices, which were added, and their labels."""
        parts = self._placed or self._parts
        first, last = index[0], index[-1] + 1
        if [*index] != [*range(first, last)]:
            rows = torch.tensor(index, device=parts[0].device)
            return [part[rows] for part in parts]
        views = [part[first:last] for part in parts]
        return [part.clone() for part in views] if self._copies else views

    def check(self) -> None:
        """Forget the images if a batch was changed in place; they are to be added again."""
        if [part._version for part in self._placed or self._parts] == self._versions:
            return
        self._copies = True
        if self._placed:
            self._placed = []
        else:
            self.n_filled, self._parts = 0, []
        self._note()

    def _note(self) -> None:
        self._versions = [part._version for part in self._placed or self._parts]


class KeptSets:
    """The images that a data set keeps, by their indices: the ones used last, within `KEPT_BYTES`.

    Args:
        n_bytes: of an image.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._sets: OrderedDict[bytes, KeptImages] = OrderedDict()

    def of(self, indices: Sequence[int]) -> KeptImages | None:
        """Return what is kept of the images at `indices`; None: they are too many."""
        if len(indices) * self.n_bytes > KEPT_BYTES:
            return None
        key = np.asarray(indices, np.int64).tobytes()
        kept = self._sets.pop(key, None) or KeptImages(len(indices))
        self._sets[key] = kept
        while sum(one.n for one in self._sets.values()) * self.n_bytes > KEPT_BYTES:
            self._sets.popitem(last=False)
        return kept


def _fits(parts: Sequence[Tensor], device: torch.device) -> bool:
    """Whether the memory of a device has room for these tensors."""
    n_bytes = sum(part.nbytes for part in parts)
    if device.type == "cuda":
        return n_bytes <= min(KEPT_BYTES, torch.cuda.mem_get_info(device)[0] // _SHARE)
    return n_bytes <= KEPT_BYTES
