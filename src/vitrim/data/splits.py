"""Labelled images of other packages, in two splits: those of Hugging Face's `datasets`, or alike.

Images get timm's transforms, mixup and cutmix as those of vitrim's own data sets do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeGuard, cast, runtime_checkable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vitrim.data.dataset import Example, ImageDataset, MapDataset, Transform, transformed
from vitrim.data.few_shot import few_shot
from vitrim.data.image_files import ImageFiles
from vitrim.data.loading import Loading
from vitrim.errors import ConfigError

_UNMIXED: Mapping[str, object] = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0}
_COLUMNS = {
    "image": ("image", "img", "pixel_values"),
    "label": ("label", "labels", "fine_label"),
}
"""Names of columns that are looked for, in this order."""


@runtime_checkable
class HasSplits(Protocol):
    """A data set in two splits, and how their images are loaded.

    `batch_size` is needed. These attributes are read if it has them: `workers`, `augmentation`,
    `mixing`, `samples` and `samples_seed`, which act as in conf/data/base/images.yaml; `classes`,
    the names of the labels; `image_column` and `label_column`.
    """

    def splits(self) -> tuple[MapDataset, MapDataset]:
        """Return the training and the validation images.

        Their items are dicts with an image (PIL, or an array of height, width, channels) and a
        class number, or pairs of them.
        """
        ...


def image_splits(source: HasSplits) -> ImageFiles:
    """Return the images of a data set in two splits as those of files.

    Raises:
        ConfigError: there is no batch size, no such column, or an image without a label.
    """
    name = type(source).__name__
    if not hasattr(source, "batch_size"):
        raise ConfigError(f"data: {name} has splits(), but no batch_size: add that field")
    parts = source.splits()
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise ConfigError(
            f"data: {name}.splits() returns a {type(parts).__name__}: expected a pair of data "
            "sets, for training and for validation"
        )
    train, val = (_Rows(part, source) for part in parts)
    classes = _classes(parts[0], source, [*train.targets, *val.targets])
    samples = getattr(source, "samples", None)
    selected: ImageDataset = train
    if samples is not None:
        selected = few_shot(
            train,
            classes=dict(enumerate(classes)),
            labels=train.targets,
            names=[f"train/{index:07}" for index in range(len(train))],
            samples=samples,
            seed=getattr(source, "samples_seed", 0),
        )
    return ImageFiles(
        train=selected,
        val=val,
        classes=classes,
        batch_size=source.batch_size,
        loading=Loading(workers=getattr(source, "workers", 0)),
        augmentation=getattr(source, "augmentation", {}),
        mixing={**_UNMIXED, **getattr(source, "mixing", {})},
    )


class _Rows(Dataset[Example]):
    """A split as pairs of an RGB image and its label."""

    def __init__(self, rows: MapDataset, source: HasSplits) -> None:
        self.rows = rows
        self.transform: Transform | None = None
        if not len(rows):
            raise ConfigError(f"data: a split of {type(source).__name__} has no images")
        self._keys: tuple[object, object] = (0, 1)
        if isinstance(rows[0], Mapping):
            found = [_column(rows[0], kind, source) for kind in ("image", "label")]
            self._keys = (found[0], found[1])
        self.targets = self._targets(type(source).__name__)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = cast(Mapping[object, object], self.rows[index])
        image = _as_image(row[self._keys[0]], index)
        return transformed((image, self.targets[index]), self.transform)

    def _targets(self, name: str) -> list[int]:
        """Return the label of every image, without decoding one where the split has a column."""
        column = self._keys[1]
        if isinstance(column, str) and hasattr(self.rows, "column_names"):
            found = self.rows[column]  # type: ignore[index]
            labels = [*cast(Sequence[object], found)]
        elif hasattr(self.rows, "targets"):
            labels = [*self.rows.targets]
        else:
            rows = (cast(Mapping[object, object], self.rows[at]) for at in range(len(self.rows)))
            labels = [row[column] for row in rows]
        numbers = [int(label) for label in labels if _is_label(label)]
        if len(numbers) < len(labels):
            wrong = next(label for label in labels if not _is_label(label))
            raise ConfigError(
                f"data: a split of {name} has the label {wrong}: expected class numbers from 0 on, "
                "of all its images"
            )
        return numbers


def _is_label(label: object) -> TypeGuard[int]:
    return isinstance(label, int | np.integer) and int(label) >= 0


def _column(row: Mapping[object, object], kind: str, source: HasSplits) -> str:
    """Return the name of the column of images or labels."""
    own = getattr(source, f"{kind}_column", None)
    names = _COLUMNS[kind] if own is None else (own,)
    for name in names:
        if name in row:
            return str(name)
    raise ConfigError(
        f"data: the images of {type(source).__name__} have the columns "
        f"{', '.join(map(str, row))}, none of {', '.join(map(str, names))}: name it in the "
        f"attribute {kind}_column"
    )


def _classes(rows: MapDataset, source: HasSplits, labels: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the classes: the source's, those of the column, or the numbers."""
    own = getattr(source, "classes", None)
    names = own if own is not None else _named(rows, source)
    number = 1 + max(labels)
    classes = tuple(map(str, range(number) if names is None else names))
    if len(classes) < number:
        raise ConfigError(
            f"data: {type(source).__name__} names {len(classes)} classes, and has labels up to "
            f"{number - 1}"
        )
    return classes


def _named(rows: MapDataset, source: HasSplits) -> Sequence[str] | None:
    """Return the names that the column of labels has (`datasets.ClassLabel`), if it has any."""
    if not hasattr(rows, "features"):
        return None
    feature = rows.features[_column(cast(Mapping[object, object], rows[0]), "label", source)]
    names: Sequence[str] | None = getattr(feature, "names", None)
    return names


def _as_image(image: object, index: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return Image.fromarray(np.asarray(image, dtype=np.uint8)).convert("RGB")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"data: image {index} is a {type(image).__name__} ({error}): expected a PIL image, or "
            "an array of height, width and channels in 8 bits"
        ) from None
