"""Sets of images of Hugging Face's `datasets`: on disk, in files that it reads, or on its hub.

Images are decoded as those of files are (`vitrim.data.reading`), and not by `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitrim.data.class_names import ordered
from vitrim.data.encoded import EncodedImages
from vitrim.data.folders import first
from vitrim.data.image_files import ImageFiles
from vitrim.data.image_sets import EncodedSplit, SetSettings, checked_splits, image_set
from vitrim.data.loading import DEFAULTS, LoadingSettings
from vitrim.data.paths import Labels, Paths
from vitrim.data.quarantine import BadImageSettings
from vitrim.errors import ConfigError, require_package

Table = Any
"""A `datasets.Dataset`: the package has no types that mypy reads."""
_ENCODED = ("binary", "large_binary", "string", "large_string")
"""Types of columns, besides `datasets.Image`, that have the bytes or the path of an image."""


def huggingface_set(
    *,
    root: str,
    subset: str | None,
    train: str | None,
    val: str,
    image_key: str,
    label_key: str,
    download: bool,
    samples: int | None,
    samples_seed: int,
    batch_size: int,
    workers: int | str,
    bad_images: BadImageSettings,
    augmentation: Mapping[str, object],
    mixing: Mapping[str, object],
    exif_orientation: bool = False,
    loading: LoadingSettings = DEFAULTS,
) -> ImageFiles:
    """Return two splits of a set of images; the classes are those of the column of labels.

    `root` is a folder that `save_to_disk` wrote, a folder or Parquet file that `load_dataset`
    reads, or the name of a set on the hub, which `download` allows to download. `subset` is one of
    several subsets (configurations). `train` and `val` are splits, or slices of them such as
    train[:90%]; `train` None: there are no training images. `image_key` is the column of images, or
    of their bytes or paths, `label_key` that of labels: a ClassLabel, numbers from 0 on, or names.
    The other arguments are those of `vitrim.data.imagefolder.image_folder`.

    Raises:
        ConfigError: there is no such set, split or column, or an image has no label.
        MissingPackage: `datasets` is not installed.
    """
    require_package("datasets", "data=huggingface")
    settings = SetSettings(
        samples=samples,
        samples_seed=samples_seed,
        batch_size=batch_size,
        workers=workers,
        bad_images=bad_images,
        augmentation=augmentation,
        mixing=mixing,
        loading=loading,
    )
    specs = checked_splits(train, val, samples)
    tables = _opened(str(root), subset, download=download)
    parts = {key: _part(tables, key, spec) for key, spec in specs.items()}
    labelled = {key: _labels(part, key, label_key) for key, part in parts.items()}
    classes = _classes([*labelled.values()])
    splits = {}
    for key, part in parts.items():
        rows = _Rows(_of_images(part, key, image_key), image_key)
        labels = _numbers(labelled[key], classes)
        splits[key] = _split(key, rows, labels, exif_orientation=exif_orientation)
    return image_set(splits.get("train"), splits["val"], classes, settings)


class _Rows:
    """The contents of the image files in a column."""

    def __init__(self, table: Table, key: str) -> None:
        self._table = table
        self._key = key

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> bytes:
        cell = self._table[index][self._key]
        if cell is None:
            raise ValueError("a row without an image")
        content: bytes | None = cell["bytes"]
        return Path(cell["path"]).read_bytes() if content is None else content

    def size(self, index: int) -> int:
        """Return the bytes of one; -1 where it cannot be found."""
        try:
            return len(self[index])
        except (OSError, ValueError, TypeError):
            return -1


def _split(key: str, rows: _Rows, labels: Labels, *, exif_orientation: bool) -> EncodedSplit:
    """Return a split whose images are named by the split and their row."""
    names = Paths.of(f"{key}/{index:07}" for index in range(len(rows)))
    images = EncodedImages(rows, labels, exif_orientation=exif_orientation)
    return EncodedSplit(images=images, names=names, short_names=names)


def _opened(root: str, subset: str | None, *, download: bool) -> Mapping[str, Table]:
    """Return the splits of a set by name, which may have to be downloaded."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(root)
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if saved and subset is not None:
        raise ConfigError(
            f"data.subset={subset}: {root} was written by save_to_disk and has no subsets; "
            "data.subset=null reads it"
        )
    try:
        if saved:
            found = datasets.load_from_disk(root)
        elif path.is_file():
            found = datasets.load_dataset(path.suffix[1:], subset, data_files=root)
        else:
            with _offline(path.exists() or not download):
                found = datasets.load_dataset(root, subset)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        way = "" if path.exists() else _way_to(root, download=download)
        raise ConfigError(f"data.root={root}: no set of images{way} ({reason})") from None
    if isinstance(found, datasets.Dataset):
        return {str(found.split or "train"): found}
    tables: Mapping[str, Table] = found
    return tables


def _way_to(root: str, *, download: bool) -> str:
    if download:
        return ": neither a folder nor a file, and the hub did not give a set of that name"
    return (
        ": neither a folder nor a file, nor downloaded before; a set of that name on the hub is "
        "downloaded with data.download=true"
    )


@contextmanager
def _offline(without: bool) -> Iterator[None]:
    """Let `datasets` read what is on this machine only, if `without`."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = without or before
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _part(tables: Mapping[str, Table], key: str, spec: str) -> Table:
    """Return the rows of a split, of a slice of it, or of a sum of them."""
    import datasets

    lengths = {name: len(table) for name, table in tables.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
        ranges = [(p.splitname, range(lengths[p.splitname])[p.from_ : p.to]) for p in parts]
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"data.{key}={spec}: {error}; there are the splits "
            f"{first(f'{name} ({number:,} images)' for name, number in lengths.items())}, and "
            "slices of them such as train[:90%]"
        ) from None
    rows = [tables[name].select(part) for name, part in ranges if len(part)]
    if not rows:
        raise ConfigError(f"data.{key}={spec}: has no images")
    return rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)


def _check_column(table: Table, key: str, setting: str, value: str) -> None:
    if value not in table.column_names:
        raise ConfigError(
            f"data.{setting}={value}: the split data.{key} has the columns "
            f"{', '.join(table.column_names)}"
        )


def _of_images(table: Table, key: str, image_key: str) -> Table:
    """Return the column of images, whose rows are encoded or say where the file is."""
    import datasets

    _check_column(table, key, "image_key", image_key)
    kind = table.features[image_key]
    if not isinstance(kind, datasets.Image) and getattr(kind, "dtype", None) not in _ENCODED:
        raise ConfigError(
            f"data.image_key={image_key}: a column of {kind} in the split data.{key}: expected "
            f"images, their bytes or paths; its columns are {', '.join(table.column_names)}"
        )
    column = table.select_columns([image_key])
    return column.cast_column(image_key, datasets.Image(decode=False))


class _Labelled(NamedTuple):
    """The column of labels of a split, and the names of its classes if it has any."""

    values: np.ndarray
    names: Sequence[str] | None


def _labels(table: Table, key: str, label_key: str) -> _Labelled:
    """Return the label of every image: a number, or a name."""
    import datasets
    import pyarrow as pa

    _check_column(table, key, "label_key", label_key)
    column = table.select_columns([label_key]).with_format("arrow")[:][label_key]
    feature = table.features[label_key]
    whole = pa.types.is_integer(column.type)
    if not whole and not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise ConfigError(
            f"data.label_key={label_key}: a column of {column.type} in the split data.{key}; "
            f"expected numbers or names of classes; its columns are {', '.join(table.column_names)}"
        )
    known = column.drop_null().to_numpy()
    missing = column.null_count + (int((known < 0).sum()) if whole else 0)
    if missing:
        raise ConfigError(
            f"data.{key}: {missing:,} of {len(column):,} images have no label in column "
            f"{label_key}: choose another split"
        )
    return _Labelled(known, feature.names if isinstance(feature, datasets.ClassLabel) else None)


def _classes(splits: Sequence[_Labelled]) -> list[str]:
    """Return the names of the classes, which are those of all splits."""
    names = {tuple(split.names) for split in splits if split.names is not None}
    if len(names) > 1:
        raise ConfigError(
            "data.train, data.val: their columns of labels name other classes: "
            f"{'; '.join(first(part) for part in sorted(names))}"
        )
    if len({split.values.dtype.kind in "iu" for split in splits}) > 1:
        raise ConfigError("data.train, data.val: the one has numbers as labels, the other names")
    if splits[0].values.dtype.kind not in "iu":
        return ordered(str(name) for split in splits for name in np.unique(split.values))
    number = 1 + max(int(split.values.max()) for split in splits)
    classes = [*next(iter(names), map(str, range(number)))]
    if len(classes) < number:
        raise ConfigError(
            f"data.label_key: labels up to {number - 1}, and only {len(classes)} names of classes"
        )
    return classes


def _numbers(split: _Labelled, classes: Sequence[str]) -> Labels:
    """Return labels as numbers of classes."""
    if split.values.dtype.kind in "iu":
        return split.values.astype(np.int32)
    index = {name: label for label, name in enumerate(classes)}
    return np.fromiter((index[str(name)] for name in split.values), np.int32, len(split.values))
