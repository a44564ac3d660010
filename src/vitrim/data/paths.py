"""Paths of many files in one buffer of bytes, instead of a Python object for each of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
import xxhash

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Bounds = np.ndarray[tuple[int], np.dtype[np.int64]]
Labels = np.ndarray[tuple[int], np.dtype[np.int32]]


class Paths(Sequence[str]):
    """Texts that begin with `prefix`: the rest of each lies in `buffer`, from bound to bound.

    A text is made when it is asked for. Slices, and processes that are forked, share the buffer.

    Args:
        prefix: what all of them begin with.
        buffer: the other bytes of all of them, in the encoding of the file system.
        bounds: where each begins in the buffer, and where the last one ends, (n + 1).

    >>> paths = Paths.of(["a/1.png", "a/22.png", "a/3.png"], prefix="a/")
    >>> paths[1], [*paths[1:]], len(paths)
    ('a/22.png', ['a/22.png', 'a/3.png'], 3)
    """

    __slots__ = ("bounds", "buffer", "prefix")

    def __init__(self, prefix: str, buffer: Bytes, bounds: Bounds) -> None:
        self.prefix = prefix
        self.buffer = buffer
        self.bounds = bounds

    @classmethod
    def of(cls, texts: Iterable[str], *, prefix: str = "") -> Paths:
        """Return the texts, which begin with `prefix`, in a buffer."""
        parts = [*map(os.fsencode, _without(prefix, texts))]
        return cls(prefix, _buffer(b"".join(parts)), _bounds(map(len, parts), len(parts)))

    @classmethod
    def joined(cls, parts: Sequence[Paths]) -> Paths:
        """Return the paths of all parts, which have one prefix; in their own buffer if possible."""
        if not parts:
            return cls("", _buffer(b""), np.zeros(1, np.int64))
        first, last = parts[0], parts[-1]
        if all(a.buffer is b.buffer and a.bounds[-1] == b.bounds[0] for a, b in pairwise(parts)):
            ends = [part.bounds[1:] for part in parts]
            return cls(first.prefix, last.buffer, np.concatenate([first.bounds[:1], *ends]))
        buffer = np.concatenate([p.buffer[p.bounds[0] : p.bounds[-1]] for p in parts])
        lengths = np.concatenate([np.diff(part.bounds) for part in parts])
        return cls(first.prefix, buffer, np.concatenate([[0], lengths.cumsum()]).astype(np.int64))

    def beginning_with(self, prefix: str) -> Paths:
        """Return the same paths with another prefix."""
        return Paths(prefix, self.buffer, self.bounds)

    def checksum(self) -> str:
        """Return a digest of all paths without their prefix."""
        own = np.ascontiguousarray(self.buffer[self.bounds[0] : self.bounds[-1]])
        bounds = np.ascontiguousarray(self.bounds - self.bounds[0])
        return xxhash.xxh3_128_hexdigest(own.data) + xxhash.xxh3_128_hexdigest(bounds.data)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Paths: ...
    def __getitem__(self, index: int | slice) -> str | Paths:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"{index}: paths are sliced in steps of 1")
            return Paths(self.prefix, self.buffer, self.bounds[start : max(start, stop) + 1])
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"{index} of {len(self)} paths")
        begin, end = self.bounds[place], self.bounds[place + 1]
        return self.prefix + os.fsdecode(self.buffer[begin:end].tobytes())

    def __iter__(self) -> Iterator[str]:
        start = int(self.bounds[0])
        content = self.buffer[start : self.bounds[-1]].tobytes()
        for begin in range(0, len(self), _AT_ONCE):  # no list of all bounds
            bounds = (self.bounds[begin : begin + _AT_ONCE + 1] - start).tolist()
            for one, next_one in pairwise(bounds):
                yield self.prefix + os.fsdecode(content[one:next_one])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Paths({[*self[:3]]}{', ...' if len(self) > 3 else ''})"


_AT_ONCE = 4096


def are_sound(paths: Paths) -> bool:
    """Whether the bounds of paths divide their buffer, as those read from a file may not."""
    ends = paths.bounds[0] == 0 and paths.bounds[-1] == len(paths.buffer)
    return bool(ends and (np.diff(paths.bounds) > 0).all())


def _without(prefix: str, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if not text.startswith(prefix):
            raise ValueError(f"{text} does not begin with {prefix}")
        yield text[len(prefix) :]


def _buffer(content: bytes) -> Bytes:
    return np.frombuffer(content, np.uint8)


def _bounds(lengths: Iterable[int], number: int) -> Bounds:
    bounds = np.zeros(number + 1, np.int64)
    np.cumsum(np.fromiter(lengths, np.int64, number), out=bounds[1:])
    return bounds


def checksum_of(labels: Sequence[int]) -> str:
    """Return a digest of labels.

    >>> checksum_of([1, 2]) == checksum_of(np.array([1, 2], np.int32))
    True
    """
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(labels, dtype=np.int32).data)


def labels_of(labels: Iterable[Any], number: int) -> Labels:
    """Return `number` labels as an array."""
    return np.fromiter(labels, np.int32, number)


def ascending(texts: Sequence[str]) -> Sequence[int]:
    """Return the indices of texts in their order; no list is made where they are in order.

    >>> ascending(["a", "b"]), ascending(["b", "a"])
    (range(0, 2), [1, 0])
    """
    if all(one <= next_one for one, next_one in pairwise(texts)):
        return range(len(texts))
    known = [*texts]
    return sorted(range(len(known)), key=known.__getitem__)
