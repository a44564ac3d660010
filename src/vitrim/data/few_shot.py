"""Few-shot data: a fixed number of training images, drawn by a seed, each decoded once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitrim.data.dataset import Example, LabelledImages, Transform, transformed
from vitrim.errors import ConfigError, is_count

DECODED_BYTES = 2**32
"""What decoded images may take in a process; others are decoded again when they are used."""


class FewShotSubset(Dataset[Example]):
    """The images of `dataset` at `indices`, kept in memory when they are first used.

    Copies with another `transform` share what is kept, and so do worker processes that are forked
    later. A thousand images of ImageNet take about 0.6 GB; no more than `DECODED_BYTES` are kept.
    """

    def __init__(
        self, dataset: LabelledImages, indices: Sequence[int], names: Sequence[str]
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.names = names
        self.transform: Transform | None = None
        self.forget()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return transformed(self._decoded(index), self.transform)

    def decode(self, threads: int) -> None:
        """Decode all images that are not kept yet, as far as they may be kept."""
        missing = [index for index in range(len(self)) if index not in self._kept.examples]
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self._unless_full, missing):
                pass

    def forget(self) -> None:
        """Begin a cache of its own: the images of `dataset` are decoded otherwise."""
        self._kept = _Decoded()

    def _unless_full(self, index: int) -> None:
        if self._kept.n_bytes < DECODED_BYTES:
            self._decoded(index)

    def _decoded(self, index: int) -> Example:
        example = self._kept.examples.get(index)
        if example is None:
            example = self.dataset[self.indices[index]]
            self._kept.add(index, example)
        return example


class _Decoded:
    """Decoded images by index, with their labels."""

    def __init__(self) -> None:
        self.examples: dict[int, Example] = {}
        self.n_bytes = 0

    def add(self, index: int, example: Example) -> None:
        """Keep an image if there is room for it."""
        n_bytes = self.n_bytes + _bytes_of(example[0])
        if n_bytes <= DECODED_BYTES:
            self.examples[index], self.n_bytes = example, n_bytes


def _bytes_of(image: object) -> int:
    """Return the bytes of decoded pixels; 0: it is not known how an image has them."""
    match image:
        case Image.Image():
            return image.width * image.height * len(image.getbands())
        case Tensor():
            return image.nbytes
    return 0


def few_shot(
    dataset: LabelledImages,
    *,
    classes: Mapping[int, str],
    labels: Sequence[int],
    names: Sequence[str],
    samples: int,
    seed: int,
) -> FewShotSubset:
    """Return a class-balanced random subset of `samples` images of `dataset`.

    Every class gives the same number of images, and some give one more where a remainder is left;
    fewer images than classes are of distinct classes.

    Args:
        dataset: the training set, without a transform.
        classes: those to draw from, name by label.
        labels: one per image, all of them in `classes`.
        names: one per image; the draw depends on them and not on the images' order.
        samples: how many images.
        seed: of the draw.

    Raises:
        ConfigError: there are too few images, in total or of a class that is drawn.
    """
    _check_samples(samples, seed, available=len(labels))
    members: dict[int, list[int]] = {label: [] for label in sorted(classes)}
    for index in sorted(range(len(names)), key=names.__getitem__):
        members[labels[index]].append(index)
    indices: list[int] = []
    generator = random.Random(seed)
    for label, wanted in zip(members, shares(samples, len(members), generator), strict=True):
        if wanted > len(members[label]):
            raise ConfigError(
                f"data.samples={samples}: {wanted} of class {classes[label]} are needed, and "
                f"it has {len(members[label])} training images: add some, choose fewer samples or "
                "another data.samples_seed, or list the classes to use in data.classes"
            )
        indices += sorted(generator.sample(members[label], wanted), key=names.__getitem__)
    return FewShotSubset(dataset, indices, [names[index] for index in indices])


def _check_samples(samples: int, seed: int, *, available: int) -> None:
    if not is_count(samples) or samples < 2:
        raise ConfigError(
            f"data.samples={samples}: expected null (all) or a whole number from 2 on"
        )
    if seed != 0 and not is_count(seed):
        raise ConfigError(f"data.samples_seed={seed}: expected a whole number from 0 on")
    if samples > available:
        raise ConfigError(
            f"data.samples={samples}: there are only {available:,} training images; "
            "data.samples=null takes them all"
        )


def shares(samples: int, n_classes: int, generator: random.Random) -> list[int]:
    """Return how many images each class gives: equal numbers, the remainder drawn among them.

    >>> sorted(shares(7, 3, random.Random(0)))
    [2, 2, 3]
    """
    each, remainder = divmod(samples, n_classes)
    with_one_more = generator.sample(range(n_classes), remainder)
    return [each + (label in with_one_more) for label in range(n_classes)]
