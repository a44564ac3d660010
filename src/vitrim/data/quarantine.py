"""Images that cannot be used: training replaces and counts them, evaluation names them all.

Bad are files that cannot be decoded (truncated, empty, no image, beyond Pillow's limit against
decompression bombs) and those named after another class than their folder's
(`n01440764/n02102040_7.JPEG`). Grey, CMYK, palette, 16-bit and transparent images are none of
these: they become RGB as Pillow converts them.
"""

from __future__ import annotations

import errno
import re
import struct
import zlib
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from PIL.Image import DecompressionBombError
from torch.utils.data import Dataset

from vitrim.errors import ConfigError, VitrimError

LISTED = 10
"""Training images that an error names; quarantine.json has all that were met."""

_DAMAGE = (
    *(ValueError, TypeError, ArithmeticError, LookupError, SyntaxError, EOFError, RuntimeError),
    *(AttributeError, struct.error, zlib.error, DecompressionBombError),
)
"""What decoders raise over contents, OSError apart."""
_OF_THE_FILE = (None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)
"""Numbers of an OSError that come from a file, not from the machine; Pillow's have none."""
WNID = re.compile(r"n\d{8}")
_ELSEWHERE = re.compile(rf"[/\\]({WNID.pattern})[/\\](?!\1){WNID.pattern}_[^/\\]*\Z")


class BadImages(VitrimError):
    """Images that a run cannot use and does not accept."""

    def __init__(self, message: str) -> None:
        # a loading process puts its traceback before what it raises
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Replacing(Dataset[tuple[Any, int]]):
    """The training images of `whole`; for a bad one stands the next usable of its class.

    Which one that is depends on the files alone, so that all processes decide alike and no other
    image moves. Copies with another `transform`, and loading processes, share one memory of what
    was found bad; the ranks of a distributed run each have their own, and their own limit.
    """

    def __init__(
        self, whole: Dataset[Any], *, labels: Sequence[int], names: Sequence[str], limit: float
    ) -> None:
        self.whole = whole
        self.labels = labels
        self.names = names
        self.transform: Callable[[Any], Any] | None = None
        self._limit = allowed(limit, len(names))
        self._bad = torch.zeros(len(names), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._bad[mislabelled(names)] = True
        self._check()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for place in self._of_class(index):
            if self._bad[place]:
                continue
            item = decoded(self.whole, place, self.names[place])
            if not isinstance(item, str):
                image, label = item
                return (image if self.transform is None else self.transform(image)), label
            self._bad[place] = True
            self._check()
        raise BadImages(
            f"{self.names[index]}: no training image of its class can be used; restore some, or "
            "list the classes to use in data.classes"
        )

    def found(self) -> dict[str, str]:
        """Return why each bad image that was met is bad, by name."""
        return _reasons(self.whole, self._bad.nonzero().flatten().tolist(), self.names)

    def _of_class(self, index: int) -> Iterator[int]:
        """Yield `index`, then the places of the other images of its class, those after it first."""
        yield index
        members = self._members[self.labels[index]]
        after = bisect(members, index)
        yield from members[after:]
        yield from members[: after - 1]

    @cached_property
    def _members(self) -> dict[int, list[int]]:
        members: dict[int, list[int]] = {}
        for place, label in enumerate(self.labels):
            members.setdefault(label, []).append(place)
        return members

    def _check(self) -> None:
        places = self._bad.nonzero().flatten().tolist()
        if len(places) > self._limit:
            raise BadImages(
                f"data.bad_images.limit: {len(places)} of the {len(self):,} training images met "
                f"so far cannot be used, and {self._limit} are accepted: mend or remove them, or "
                f"raise the limit{_listed(_reasons(self.whole, places[:LISTED], self.names))}"
            )


class Strict(Dataset[tuple[Any, int]]):
    """The images of `whole` to evaluate on: a bad one ends the run or, with `skip`, is left out.

    Either way all are decoded one more time: to name every bad one when the first is met, or to
    leave them out before the first is asked for.
    """

    def __init__(
        self, whole: Dataset[Any], *, labels: Sequence[int], names: Sequence[str], skip: bool
    ) -> None:
        self.whole = whole
        self.labels = labels
        self.names = names
        self.skip = skip
        self.transform: Callable[[Any], Any] | None = None
        self._scanned: list[Sequence[int]] = []  # shared by copies
        if not skip and mislabelled(names):
            self._fail(mislabelled(names))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        place = self.places[index]
        item = decoded(self.whole, place, self.names[place])
        if isinstance(item, str):
            self._fail(unusable(self.whole, self.names))
        image, label = item
        return (image if self.transform is None else self.transform(image)), label

    @property
    def places(self) -> Sequence[int]:
        """Places in `whole` of the images that count."""
        if not self.skip:
            return range(len(self.names))
        if not self._scanned:
            bad = unusable(self.whole, self.names)
            if len(bad) == len(self.names):
                self._fail(bad)
            self._scanned.append(sorted({*range(len(self.names))} - {*bad}))
        return self._scanned[0]

    def found(self) -> dict[str, str]:
        """Return why each image that was left out is bad, by name."""
        if not self._scanned:
            return {}
        left_out = {*range(len(self.names))} - {*self._scanned[0]}
        return _reasons(self.whole, sorted(left_out), self.names)

    def _fail(self, places: Sequence[int]) -> None:
        raise BadImages(
            f"{len(places)} of the {len(self.names):,} images to evaluate on cannot be used: mend "
            "or remove them, or judge on the others with data.bad_images.evaluation=skip"
            f"{_listed(_reasons(self.whole, places, self.names))}"
        )


def strict(
    whole: Dataset[Any], *, labels: Sequence[int], names: Sequence[str], evaluation: str
) -> Strict:
    """Return the images to evaluate on; `evaluation` says what a bad one does, fail or skip."""
    if evaluation not in ("fail", "skip"):
        raise ConfigError(f"data.bad_images.evaluation={evaluation}: expected fail or skip")
    return Strict(whole, labels=labels, names=names, skip=evaluation == "skip")


def allowed(limit: float, size: int) -> int:
    """Return how many of `size` images may be bad, from a share (0.01) or a number.

    >>> allowed(0.01, 250), allowed(3, 250)
    (2, 3)
    """
    if type(limit) is int and limit >= 0:
        return limit
    if type(limit) is float and 0 <= limit <= 1:
        return int(limit * size)
    raise ConfigError(
        f"data.bad_images.limit={limit}: expected a share of the training images (0.0 to 1.0), or "
        "a whole number from 0 on"
    )


def decoded(whole: Dataset[Any], place: int, name: str) -> Any:
    """Return the image and label of `whole` at `place`; or, of an unusable image, why it is.

    Raises:
        BadImages: the machine failed to read the file, which says nothing about the image.
    """
    try:
        return whole[place]
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise BadImages(
                f"{name}: could not be read, by no fault of its own ({error})"
            ) from None
        return _reason(error)
    except _DAMAGE as error:
        return _reason(error)


def mislabelled(names: Sequence[str]) -> list[int]:
    """Return the places of files that begin with another wnid than their folder's.

    >>> mislabelled(["train/n01440764/n01440764_1.JPEG", "train/n01440764/n02102040_7.JPEG"])
    [1]
    """
    return [place for place, name in enumerate(names) if _ELSEWHERE.search(name)]


def unusable(whole: Dataset[Any], names: Sequence[str]) -> list[int]:
    """Decode every image and return the places of the bad ones, ascending."""
    named = set(mislabelled(names))
    with ThreadPoolExecutor() as pool:
        damaged = pool.map(
            lambda place: isinstance(decoded(whole, place, names[place]), str), range(len(names))
        )
        return [place for place, is_bad in enumerate(damaged) if is_bad or place in named]


def _reasons(whole: Dataset[Any], places: Sequence[int], names: Sequence[str]) -> dict[str, str]:
    wrong = {place: decoded(whole, place, names[place]) for place in places}
    return {
        names[place]: item if isinstance(item, str) else "named after another class"
        for place, item in wrong.items()
    }


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _listed(reasons: dict[str, str]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
