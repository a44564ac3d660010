"""Few-shot data: so many training images and no more, drawn by a seed, each decoded once."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from vitrim.errors import ConfigError, is_count


class Few(Dataset[tuple[Any, int]]):
    """The images of `whole` at `places`, kept in memory from their first use on.

    Copies with another `transform` share what is kept; every worker process keeps its own. A
    thousand images of ImageNet take about 0.6 GB.
    """

    def __init__(self, whole: Dataset[Any], places: Sequence[int], names: Sequence[str]) -> None:
        self.whole = whole
        self.places = places
        self.names = names
        self.transform: Callable[[Any], Any] | None = None
        self._kept: dict[int, tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index not in self._kept:
            self._kept[index] = self.whole[self.places[index]]
        image, label = self._kept[index]
        return (image if self.transform is None else self.transform(image)), label


def few(
    whole: Dataset[Any],
    *,
    classes: Mapping[int, str],
    labels: Sequence[int],
    names: Sequence[str],
    samples: int,
    seed: int,
) -> Few:
    """Return `samples` images of `whole`: one each of so many classes, or as many of every class.

    Args:
        whole: the training set, without a transform.
        classes: those to draw from, name by label.
        labels: of each image, all among them.
        names: of each image; the draw depends on them and not on the images' order.
        samples: how many.
        seed: of the draw.

    Raises:
        ConfigError: not that many images, of all or of a class that is drawn.
    """
    if not is_count(samples) or samples < 2:
        raise ConfigError(
            f"data.samples={samples}: expected null (all) or a whole number from 2 on"
        )
    if seed != 0 and not is_count(seed):
        raise ConfigError(f"data.samples_seed={seed}: expected a whole number from 0 on")
    if samples > len(labels):
        raise ConfigError(
            f"data.samples={samples}: there are only {len(labels):,} training images; "
            "data.samples=null takes them all"
        )
    members: dict[int, list[int]] = {label: [] for label in sorted(classes)}
    for place in sorted(range(len(names)), key=names.__getitem__):
        members[labels[place]].append(place)
    places = []
    generator = random.Random(seed)
    for label, wanted in zip(members, shares(samples, len(members), generator), strict=True):
        if wanted > len(members[label]):
            raise ConfigError(
                f"data.samples={samples}: {wanted} of class {classes[label]} are needed, and "
                f"it has {len(members[label])} training images: add some, choose fewer samples or "
                "another data.samples_seed, or list the classes to use in data.classes"
            )
        places += sorted(generator.sample(members[label], wanted), key=names.__getitem__)
    return Few(whole, places, [names[place] for place in places])


def shares(samples: int, n_classes: int, generator: random.Random) -> list[int]:
    """Return how many images each class gives: alike, and one more where a remainder is drawn.

    >>> sorted(shares(7, 3, random.Random(0)))
    [2, 2, 3]
    """
    each, rest = divmod(samples, n_classes)
    favoured = generator.sample(range(n_classes), rest)
    return [each + (label in favoured) for label in range(n_classes)]
