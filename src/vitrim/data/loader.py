"""Batches whose order and randomness depend only on the seed, the epoch and the position.

Any batch can therefore be the next one, and a run that was stopped resumes exactly: neither the
order of images nor what augmentation draws for an image depends on earlier draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from vitrim.data.dataset import MapDataset
from vitrim.data.kept import KeptImages
from vitrim.data.loading import Loading

IN_THIS_PROCESS = Loading(workers=0)


def seed_all(*parts: int) -> None:
    """Seed the generators of Python, NumPy and torch, on every device, by `parts`."""
    seed = _seed_host(*parts)
    if torch.accelerator.is_available():  # else torch notes a traceback for each kind, 3 ms a step
        torch.manual_seed(seed)


def _seed_host(*parts: int) -> int:
    """Seed the generators that augmentation draws from, 20 times as fast; return the seed."""
    text = ",".join(map(str, parts))
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # timm's augmentations draw from it
    torch.default_generator.manual_seed(seed)
    return seed


class ResumableBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), shuffled by seed and epoch or sequential, from any batch on.

    Each of `world` processes gets every `world`-th index. Shuffled, all processes get the same
    number of full batches, and the remaining images are not seen in this epoch. Sequential, the
    last batch may be smaller, and every index belongs to exactly one process. With `reshuffle`
    the batches are as if sequential, but from the second epoch on their order is random.

    With `repeats` above 1, shuffled batches have so many views of an image, one after another, in
    an epoch of as many batches, which so has fewer different images (repeated augmentation, Hoffer
    et al., arXiv 1901.09335). Each view has an epoch number of its own, which what it draws depends
    on.

    `drawn_epoch` is the epoch whose order and randomness these batches have; None: that of `epoch`.
    """

    repeats: int = 1
    drawn_epoch: int | None = None

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
        reshuffle: bool = False,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self.reshuffle = reshuffle
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        if self.shuffle:
            return self.size // self.world // self.batch_size
        return -(-len(range(self.rank, self.size, self.world)) // self.batch_size)

    @property
    def sampler(self) -> ResumableBatchSampler:
        """The sampler whose `set_epoch` Lightning calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` at its first batch, unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch if self.drawn_epoch is None else self.drawn_epoch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = (
            torch.randperm(self.size, generator=generator)
            if self.shuffle or (self.reshuffle and epoch)
            else torch.arange(self.size)
        )
        repeats = self.repeats if self.shuffle else 1
        for batch in range(self.start, len(self)):
            first, last = batch * self.batch_size, (batch + 1) * self.batch_size
            place = self.rank + self.world * torch.arange(first, last)
            place = place[place < self.size]
            epochs = (epoch + (place % repeats << 32)).tolist()
            yield [*zip(epochs, order[place // repeats].tolist(), strict=True)]


class SeededDataset(Dataset[object]):
    """The items of `dataset` by (epoch, index), which also seeds what their transforms draw.

    `augmented` has the same items for all epochs after the first; None: `dataset` has them.
    """

    def __init__(self, dataset: MapDataset, seed: int, augmented: MapDataset | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> object:
        _seed_host(self.seed, *key)
        epoch, index = key
        if epoch and self.augmented is not None:
            return self.augmented[index]
        return self.dataset[index]


class ResumableLoader(DataLoader[object]):
    """A loader in the order of its batch sampler; it saves its position and resumes from it.

    `kept` takes the images of `dataset`, for whose transform nothing is drawn, when they are first
    made, and has them from then on.
    """

    def __init__(
        self,
        dataset: MapDataset,
        batches: ResumableBatchSampler,
        *,
        loading: Loading = IN_THIS_PROCESS,
        augmented: MapDataset | None = None,
        kept: KeptImages | None = None,
    ) -> None:
        options = loading.options(len(batches))
        if kept is not None and augmented is None:
            options["persistent_workers"] = False  # one epoch needs them
        super().__init__(
            SeededDataset(dataset, batches.seed, augmented),
            batch_sampler=batches,
            **options,  # type: ignore[arg-type]
        )
        self.loading = loading
        self.batches = batches
        self.images = dataset
        self.kept = kept
        self._augments = augmented is not None
        self._device = torch.device("cpu")
        self._n_yielded = 0

    def __iter__(self) -> Iterator[object]:  # type: ignore[override]
        self._n_yielded = self.batches.start
        keeps = self.kept is not None and not (self._augments and self.batches.epoch)
        for batch in self._kept_batches() if keeps else super().__iter__():
            self._n_yielded += 1
            yield batch

    def place_on(self, device: torch.device) -> None:
        """Keep images that are kept on a device, where they fit; on the CPU: no longer on any."""
        self._device = device
        if self.kept is not None and device.type == "cpu":
            self.kept.place(device)

    def _kept_batches(self) -> Iterator[object]:
        """Yield batches from memory; make those that are not there yet, and keep them.

        In order they are kept as they go by; if they are shuffled, all images are made first.
        """
        kept, batches = self.kept, self.batches
        assert kept is not None
        made: Iterator[object] | None = None
        for number, keys in enumerate(batches, batches.start):
            index = [index for _, index in keys]
            kept.check()
            if made is None and max(index) >= kept.n_filled:
                if batches.shuffle or index[0] > kept.n_filled:
                    self._fill(kept)
                else:
                    made = self._made_from(number)
            if made is None:
                kept.place(self._device)
                yield kept.batch(index)
            else:
                batch = cast(Sequence[Tensor], next(made))
                kept.add(batch, index[0])
                yield batch

    def _made_from(self, number: int) -> Iterator[object]:
        """Yield the batches of this epoch from `number` on, as they are made."""
        start, self.batches.start = self.batches.start, number
        made = super().__iter__()
        try:
            first = next(made)
        finally:
            self.batches.start = start
        yield first
        yield from made

    def _fill(self, kept: KeptImages) -> None:
        """Make all images that are not kept yet."""
        rest = subset(self.images, range(kept.n_filled, kept.n))
        for batch in sequential(rest, self.batches.batch_size, loading=self.loading):
            kept.add(cast(Sequence[Tensor], batch), kept.n_filled)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were yielded."""
        return {"epoch": self.batches.epoch, "given": self._n_yielded}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Resume where `state` was taken; at the end of an epoch, with the next one."""
        ended = state["given"] >= len(self)
        self.batches.epoch = state["epoch"] + ended
        self.batches.start = 0 if ended else state["given"]

    def draw_as(self, epoch: int) -> None:
        """Draw from now on, in any epoch, the order and randomness of `epoch`, from 0 on."""
        self.batches.drawn_epoch = epoch

    def first_epoch(self) -> ResumableLoader:
        """Return the batches of the first epoch, of a loader that is not shuffled in it."""
        return sequential(self.images, self.batches.batch_size, kept=self.kept)


def sequential(
    dataset: MapDataset,
    batch_size: int,
    *,
    loading: Loading = IN_THIS_PROCESS,
    kept: KeptImages | None = None,
) -> ResumableLoader:
    """Return every item of `dataset` in order, all of them in every process."""
    batches = ResumableBatchSampler(len(dataset), batch_size=batch_size, seed=0, shuffle=False)
    return ResumableLoader(dataset, batches, loading=loading, kept=kept)


def plain_then_augmented(
    plain: MapDataset,
    augmented: MapDataset,
    batch_size: int,
    *,
    seed: int,
    loading: Loading = IN_THIS_PROCESS,
    kept: KeptImages | None = None,
) -> ResumableLoader:
    """Return every item in every epoch and process: plain and in order, then augmented, reshuffled.

    From the second epoch on, what augmentation draws for an item depends on `seed`, the epoch and
    the item's index alone, and the order of items on `seed` and the epoch.

    Args:
        plain: the items of the first epoch.
        augmented: the same items in all later epochs.
        batch_size: of all batches but the last of an epoch.
        seed: of order and augmentation.
        loading: by which processes.
        kept: where the plain items are kept; None: nowhere.
    """
    batches = ResumableBatchSampler(
        len(plain), batch_size=batch_size, seed=seed, shuffle=False, reshuffle=True
    )
    return ResumableLoader(plain, batches, loading=loading, augmented=augmented, kept=kept)


def n_held_out(images: int, share: float) -> int:
    """Return how many of `images` are held out: a share of them, at least one; 0: none.

    >>> n_held_out(1000, 0.1), n_held_out(3, 0.1), n_held_out(3, 0.0)
    (100, 1, 0)
    """
    return max(1, round(share * images)) if share else 0


def subset(images: MapDataset, index: Sequence[int]) -> MapDataset:
    """Return the indexed items of `images`."""
    chosen: Subset[object] = Subset(images, index)  # type: ignore[arg-type]
    return chosen
