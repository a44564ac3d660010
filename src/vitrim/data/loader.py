"""Batches whose order and randomness hang on seed, epoch and place alone, so that any can be next.

A run that was stopped after some batch then goes on exactly as if it had not been: neither the
order of images nor what augmentation draws for one depends on what was drawn before.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def seed_all(*parts: int) -> None:
    """Seed the generators of Python, NumPy and torch, on every device, by `parts`."""
    torch.manual_seed(_seed_host(*parts))


def _seed_host(*parts: int) -> int:
    """Seed the generators that images are augmented with, 20 times as fast; return the seed."""
    text = ",".join(map(str, parts))
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # timm's augmentations draw from it
    torch.default_generator.manual_seed(seed)
    return seed


class Order(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): shuffled by seed and epoch, or as they are, from any batch on.

    Of `world` processes, each gives every `world`-th place. Shuffled, all of them give as many
    batches of full size, and what is left over is not seen in this epoch; as they are, the last
    batch may be smaller, and every place is given once by one process.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        if self.shuffle:
            return self.size // self.world // self.batch_size
        return -(-len(range(self.rank, self.size, self.world)) // self.batch_size)

    @property
    def sampler(self) -> Order:
        """The one that Lightning tells of a new epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`; does nothing where it has been begun."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        places = (
            torch.randperm(self.size, generator=generator)
            if self.shuffle
            else torch.arange(self.size)
        )
        mine = places[self.rank :: self.world].tolist()
        for batch in range(self.start, len(self)):
            part = mine[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, place) for place in part]


class Numbered(Dataset[Any]):
    """The items of `dataset` by (epoch, index), which also seed what their transforms draw."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, place: tuple[int, int]) -> Any:
        _seed_host(self.seed, *place)
        return self.dataset[place[1]]


class Batches(DataLoader[Any]):
    """A loader of batches in some `Order`, which says where it is and can begin there again."""

    def __init__(self, dataset: Dataset[Any], order: Order, *, workers: int = 0) -> None:
        super().__init__(
            Numbered(dataset, order.seed),
            batch_sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self.order = order
        self._given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._given = self.order.start
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches were given."""
        return {"epoch": self.order.epoch, "given": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration begin where `state` was taken: at the end, with the next epoch."""
        over = state["given"] >= len(self)
        self.order.epoch = state["epoch"] + over
        self.order.start = 0 if over else state["given"]


def alike(dataset: Dataset[Any], batch_size: int, *, workers: int = 0) -> Batches:
    """Return every item of `dataset` in order, the same in every process."""
    order = Order(
        len(dataset),  # type: ignore[arg-type]
        batch_size=batch_size,
        seed=0,
        shuffle=False,
    )
    return Batches(dataset, order, workers=workers)
