"""The images that a user has, as the data set of a run: held by their position, in one order.

Methods pair images with what the dense network makes of them, so every pass has to see the same
images in the same order. A DataLoader's images are therefore read by their index in its data set,
ascending, whatever order it would give them in, and each of them is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from vitrim.data import ImageSpec, Loaders, sample_indices
from vitrim.data.dataset import MapDataset
from vitrim.data.loader import sequential, subset
from vitrim.errors import ConfigError, is_count

NO_LABEL = -1
"""What stands for the label of an image that has none."""
_PIXELS, _LABELS = ("pixel_values", "images", "image"), ("labels", "label")
_FORMS = (
    "a tensor (N, C, H, W), a DataLoader, a data set, or an iterable of tensors, of (images, "
    "labels), or of dicts with pixel_values"
)
Pair = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and their labels (B,)."""


class HeldImages(Dataset[tuple[Tensor, int]]):
    """Images (C, H, W) in float32 with their labels, by position; each is read once.

    Args:
        size: how many there are.
        read: returns the image at a position, and its label.
        name: of the argument, for messages.
    """

    def __init__(self, size: int, read: Callable[[int], tuple[Tensor, int]], name: str) -> None:
        self._size = size
        self._read = read
        self._name = name
        self._known: dict[int, tuple[Tensor, int]] = {}
        if not size:
            raise ConfigError(f"{name}: no images: expected at least one")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index not in self._known:
            image, label = self._read(index)
            if not bool(image.isfinite().all()):
                raise ConfigError(
                    f"{self._name}: image {index} has values that are NaN or infinite"
                )
            self._known[index] = image.float(), label
        return self._known[index]


def hold(images: object, *, most: int | None, name: str = "images") -> HeldImages:
    """Return the images in any of the forms that a user has them in.

    Args:
        images: a tensor (N, C, H, W), a DataLoader, a map-style data set, or an iterable of
            tensors, (images, labels) or dicts with pixel_values, each a batch or one image.
        most: how many are taken of an iterable that has no length; None: all.
        name: of the argument, for messages.

    Raises:
        ConfigError: they are none of these, or there are none.
    """
    match images:
        case Tensor():
            return _of_batches([images], name)
        case (Tensor() as pixels, Tensor() as labels) if labels.ndim == 1 and pixels.ndim == 4:
            return _of_batches([(pixels, labels)], name)
        case DataLoader():
            return _of_loader(images, most, name)
        case str() | bytes() | int() | float() | None:
            raise ConfigError(f"{name}={images!r}: expected {_FORMS}")
        case Mapping():
            return _of_batches([images], name)
        case Sequence():
            return _of_batches(images, name)
        case _ if isinstance(images, Sized) and hasattr(images, "__getitem__"):
            return _of_dataset(cast(MapDataset, images), range(len(images)), None, name)
        case Iterable():
            return _of_stream(images, most, name)
    raise ConfigError(f"{name}: a {type(images).__name__}: expected {_FORMS}")


def batches_of(loader: object, name: str) -> Iterator[Pair]:
    """Iterate over images and labels of an iterable of batches."""
    for batch in cast(Iterable[object], loader):
        images, labels = _pair(batch, name)
        yield images.float(), labels


def _of_batches(batches: Sequence[object], name: str) -> HeldImages:
    """Return the images in a sequence of batches, or of single images."""
    pairs = [_pair(batch, name) for batch in batches]
    places = [(number, row) for number, (part, _) in enumerate(pairs) for row in range(len(part))]

    def read(index: int) -> tuple[Tensor, int]:
        number, row = places[index]
        part, labels = pairs[number]
        return part[row], int(labels[row])

    return HeldImages(len(places), read, name)


def _of_stream(stream: Iterable[object], most: int | None, name: str) -> HeldImages:
    """Return the first images of an iterable without a length."""
    batches: list[object] = []
    count = 0
    for batch in stream:
        pair = _pair(batch, name)
        batches.append(pair)
        count += len(pair[0])
        if most is not None and count >= most:
            break
    return _of_batches(batches, name)


def _of_loader(loader: DataLoader[object], most: int | None, name: str) -> HeldImages:
    """Return the images that a loader would give, in the order of its data set."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return _of_stream(loader, most, name)
    batches: object = loader.batch_sampler
    own = batches is not None and type(batches) is not BatchSampler
    positions = chain.from_iterable(cast(Any, batches)) if own else loader.sampler
    chosen = sorted({*map(int, positions)})
    return _of_dataset(cast(MapDataset, dataset), chosen, loader.collate_fn, name)


def _of_dataset(
    dataset: MapDataset,
    positions: Sequence[int],
    collate: Callable[[list[Any]], Any] | None,
    name: str,
) -> HeldImages:
    """Return images of a map-style data set."""

    def read(index: int) -> tuple[Tensor, int]:
        item = dataset[positions[index]]
        images, labels = _pair(item if collate is None else collate([item]), name)
        if len(images) != 1:
            raise ConfigError(f"{name}: item {index} has {len(images)} images: expected one")
        return images[0], int(labels[0])

    return HeldImages(len(positions), read, name)


def _pair(item: object, name: str) -> Pair:
    """Return images (B, C, H, W) and labels (B,) of a batch or of one image, in any form."""
    labels: object = None
    match item:
        case Mapping():
            images = next((item[key] for key in _PIXELS if key in item), None)
            labels = next((item[key] for key in _LABELS if key in item), None)
            if images is None:
                found = ", ".join(map(str, item)) or "nothing"
                raise ConfigError(f"{name}: a dict with {found}: expected pixel_values")
        case (first, second, *_):
            images, labels = first, second
        case (only,):
            images = only
        case _:
            images = item
    if (
        not isinstance(images, Tensor)
        or not images.is_floating_point()
        or images.ndim not in (3, 4)
    ):
        raise ConfigError(f"{name}: {_described(images)}: expected {_way_out(images)}")
    batch = images if images.ndim == 4 else images[None]
    return batch.detach().cpu(), _labels(labels, len(batch), name)


def _described(images: object) -> str:
    if isinstance(images, Tensor):
        return f"a tensor {tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}"
    return f"a {type(images).__name__}"


def _way_out(images: object) -> str:
    if isinstance(images, Tensor):
        return "images (C, H, W) or batches (B, C, H, W) of floats, normalised as for the network"
    return (
        f"{_FORMS}; pictures become tensors by timm.data.create_transform("
        "**timm.data.resolve_model_data_config(net))"
    )


def _labels(labels: object, count: int, name: str) -> Tensor:
    """Return labels (B,) as integers; NO_LABEL where there are none."""
    if labels is None:
        return torch.full((count,), NO_LABEL)
    found = torch.as_tensor(labels).cpu()
    if found.ndim == 2 and len(found) == count:  # soft labels
        found = found.argmax(1)
    found = found.reshape(-1)
    if len(found) != count or found.is_floating_point():
        raise ConfigError(
            f"{name}: {count} images and labels {_described(torch.as_tensor(labels))}: expected "
            "one whole number for each image"
        )
    return found.long()


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnData:
    """The images of a user as a data set.

    Args:
        images: unlabelled, for calibration and for training without labels.
        train: batches to train on, with labels; None: `images`, reshuffled in every epoch.
        validation: labelled images to evaluate on; None: nothing is evaluated.
        n_classes: outputs of the network.
        needed: how many of `images` the method uses, at most.
        batch_size: of batches of `images` and `validation`.
        seed: by which images are drawn.
    """

    images: HeldImages
    train: object
    validation: HeldImages | None
    n_classes: int
    needed: int
    batch_size: int
    seed: int

    @property
    def trainable(self) -> bool:
        """There are images."""
        return True

    @property
    def sample_names(self) -> Sequence[str]:
        """Empty: images have no names."""
        return ()

    def module(self, spec: ImageSpec) -> Loaders:
        """Return the loaders."""
        return _OwnLoaders(self)

    def check(self, shape: tuple[int, int, int], *, any_size: bool) -> None:
        """Read the images that the method uses, and refuse those that the network cannot process.

        Raises:
            ConfigError: one is of another shape than `shape`, (channels, height, width), or not
                finite.
        """
        chosen = sample_indices(len(self.images), self.needed, self.seed)
        check_images(self.images, chosen, shape, any_size=any_size)
        if self.validation is not None:
            check_images(self.validation, range(1), shape, any_size=any_size)


def check_images(
    images: HeldImages, chosen: Iterable[int], shape: tuple[int, int, int], *, any_size: bool
) -> None:
    """Read the chosen images, and refuse those that a network cannot process.

    Raises:
        ConfigError: one is of another shape than `shape`, (channels, height, width), or not finite.
    """
    found = sorted({tuple(images[index][0].shape) for index in chosen})
    for one in found:
        if one[0] != shape[0] or not (any_size or one[1:] == shape[1:]):
            wanted = f"{shape[0]} channels" if any_size else str(shape)
            raise ConfigError(
                f"images of {one} (channels, height, width): the network expects {wanted}"
            )
    if len(found) > 1:
        raise ConfigError(f"images of several shapes: {', '.join(map(str, found))}")


class _OwnLoaders(Loaders):
    def __init__(self, data: OwnData) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> object:
        """Return the batches to train on: the user's own, or the images, reshuffled."""
        if self.data.train is not None:
            return _Batches(self.data.train)
        chosen = sample_indices(len(self.data.images), self.data.needed, self.data.seed)
        return self.shuffled(subset(self.data.images, chosen), self.data.batch_size)

    def val_dataloader(self) -> object:
        """Return every image to evaluate on; nothing where there is none."""
        validation = self.data.validation
        return [] if validation is None else self.in_order(validation, self.data.batch_size)

    def calibration_dataloader(self, samples: int, seed: int) -> DataLoader[object]:
        """Return `samples` of the images, or all of them, in order."""
        chosen = sample_indices(len(self.data.images), samples, seed)
        return sequential(subset(self.data.images, chosen), self.data.batch_size)


class _Batches:
    """The batches of a user's loader as images and labels, in every epoch again."""

    def __init__(self, loader: object) -> None:
        self.loader = loader
        size = getattr(loader, "batch_size", None)
        self.batch_size = size or len(next(batches_of(loader, "train"))[0])

    @property
    def batch_sampler(self) -> _Batches:
        """What knows the size of a batch, as a DataLoader has it."""
        return self

    def __len__(self) -> int:
        return len(cast(Sized, self.loader))

    def __iter__(self) -> Iterator[Pair]:
        return batches_of(self.loader, "train")


def check_train(train: object) -> None:
    """Refuse batches that have no labels, or no length.

    Raises:
        ConfigError: naming what is missing.
    """
    if not isinstance(train, Sized) or not isinstance(train, Iterable) or not is_count(len(train)):
        raise ConfigError(
            "train: expected a DataLoader, or another iterable of (images, labels) that has a "
            "length and gives its batches again in every epoch"
        )
    for images, labels in islice(batches_of(train, "train"), 1):
        if bool((labels == NO_LABEL).any()):
            raise ConfigError(f"train: batches of {len(images)} images without labels")
