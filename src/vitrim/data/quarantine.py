"""Data sets that contain bad images: training replaces them, evaluation names them all.

`vitrim.data.defects` says what makes an image bad.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from typing import NoReturn, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from vitrim.data.dataset import Example, LabelledImages, Transform, transformed
from vitrim.data.defects import BadImages, bad_indices, decode, defect_reasons, listed, mislabelled
from vitrim.data.listing import noted
from vitrim.errors import ConfigError

MAX_LISTED = 10
"""Training images that an error names; quarantine.json lists all that were met."""


class BadImageSettings(TypedDict):
    """What the configuration accepts: `limit` in training, `evaluation` fail or skip."""

    limit: float
    evaluation: str


class TolerantDataset(Dataset[Example]):
    """The training images of `dataset`; the next usable image of its class replaces a bad one.

    The replacement depends on the files alone, so that all processes choose the same one and no
    other image moves. Copies with another `transform`, and worker processes, share the record of
    bad images; the ranks of a distributed run each have their own record and their own limit.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        *,
        labels: Sequence[int],
        names: Sequence[str],
        limit: float,
    ) -> None:
        self.dataset = dataset
        self.labels = labels
        self.names = names
        self.transform: Transform | None = None
        self._labels = np.asarray(labels)
        self._limit = max_bad_images(limit, len(names))
        self._bad = torch.zeros(len(names), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._bad[_mislabelled(names)] = True
        self._check_limit()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        for candidate in self._candidates(index):
            if self._bad[candidate]:
                continue
            outcome = decode(self.dataset, candidate, self.names[candidate])
            if not isinstance(outcome, str):
                return transformed(outcome, self.transform)
            self._bad[candidate] = True
            self._check_limit()
        raise BadImages(
            f"{self.names[index]}: no training image of its class can be used; restore some, or "
            "list the classes to use in data.classes"
        )

    def bad_images(self) -> dict[str, str]:
        """Return why each bad image that was met is bad, by name."""
        return defect_reasons(self.dataset, self._bad_indices(), self.names)

    def _bad_indices(self) -> list[int]:
        indices: list[int] = self._bad.nonzero().flatten().tolist()
        return indices

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield `index`, then the other images of its class, beginning with the next one."""
        yield index
        members = np.flatnonzero(self._labels == self._labels[index]).tolist()
        after = bisect(members, index)
        yield from members[after:]
        yield from members[: after - 1]

    def _check_limit(self) -> None:
        indices = self._bad_indices()
        if len(indices) > self._limit:
            named = defect_reasons(self.dataset, indices[:MAX_LISTED], self.names)
            raise BadImages(
                f"data.bad_images.limit: {len(indices)} of the {len(self):,} training images met "
                f"so far cannot be used, and {self._limit} are accepted: mend or remove them, or "
                f"raise the limit{listed(named)}"
            )


class StrictDataset(Dataset[Example]):
    """The images of `dataset` for evaluation: a bad one ends the run or is skipped.

    `evaluation` is "fail" or "skip". Either way all images are decoded one more time: to name every
    bad one when the first is met, or to skip them before the first image is requested.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        *,
        labels: Sequence[int],
        names: Sequence[str],
        evaluation: str,
    ) -> None:
        if evaluation not in ("fail", "skip"):
            raise ConfigError(f"data.bad_images.evaluation={evaluation}: expected fail or skip")
        self.dataset = dataset
        self.labels = labels
        self.names = names
        self.transform: Transform | None = None
        self._skips = evaluation == "skip"
        self._usable: list[Sequence[int]] = []  # at most one item; copies share it
        if not self._skips and _mislabelled(names):
            self._fail(_mislabelled(names))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        source = self.indices[index]
        outcome = decode(self.dataset, source, self.names[source])
        if isinstance(outcome, str):
            self._fail(bad_indices(self.dataset, self.names))
        return transformed(outcome, self.transform)

    @property
    def indices(self) -> Sequence[int]:
        """Indices in `dataset` of the images that are evaluated on."""
        if not self._skips:
            return range(len(self.names))
        if not self._usable:
            bad = bad_indices(self.dataset, self.names)
            if len(bad) == len(self.names):
                self._fail(bad)
            self._usable.append(self._all_but(bad))
        return self._usable[0]

    def bad_images(self) -> dict[str, str]:
        """Return why each skipped image is bad, by name."""
        if not self._usable:
            return {}
        return defect_reasons(self.dataset, self._all_but(self._usable[0]), self.names)

    def _all_but(self, indices: Sequence[int]) -> list[int]:
        return sorted({*range(len(self.names))} - {*indices})

    def _fail(self, indices: Sequence[int]) -> NoReturn:
        raise BadImages(
            f"{len(indices)} of the {len(self.names):,} images to evaluate on cannot be used: mend "
            "or remove them, or evaluate on the others with data.bad_images.evaluation=skip"
            f"{listed(defect_reasons(self.dataset, indices, self.names))}"
        )


def _mislabelled(names: Sequence[str]) -> list[int]:
    """Return the indices of images that are named after another class (`mislabelled`)."""
    return noted("mislabelled", names, None, lambda: mislabelled(names))


def max_bad_images(limit: float, size: int) -> int:
    """Return how many of `size` images may be bad, from a share (0.01) or a number.

    >>> max_bad_images(0.01, 250), max_bad_images(3, 250)
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
