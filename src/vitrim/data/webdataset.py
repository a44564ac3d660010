"""Shards of webdataset: tar files of images and of their labels.

Any image can be read at any time (`vitrim.data.shards`), so that the order of images depends on
the seed and the epoch alone, and a stopped run resumes exactly. webdataset itself reads shards from
their beginning; it is not needed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vitrim.data.encoded import EncodedImages
from vitrim.data.folders import first
from vitrim.data.image_files import ImageFiles
from vitrim.data.image_sets import EncodedSplit, SetSettings, checked_splits, image_set
from vitrim.data.loading import DEFAULTS, LoadingSettings
from vitrim.data.quarantine import BadImageSettings
from vitrim.data.shards import Keys, Samples, expanded, read_samples
from vitrim.errors import ConfigError


def webdataset_shards(
    *,
    root: str,
    train: str | None,
    val: str,
    image_keys: Sequence[str],
    label_key: str,
    class_names: str | None,
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
    """Return the images of the shards `train` and `val` below the folder `root`.

    `train` and `val` are patterns of files (`vitrim.data.shards.expanded`); `train` None: there are
    no training images. The first of `image_keys` that a sample has is its image, and `label_key` is
    its label, a number as text. `class_names` is a file below `root`, or anywhere, with a line per
    class; None: classes are named by their numbers. The other arguments are those of
    `vitrim.data.imagefolder.image_folder`.

    Raises:
        ConfigError: a shard is missing or damaged, or an image has no label.
    """
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
    folder, keys = Path(str(root)), _keys(image_keys, label_key)
    if not folder.is_dir():
        raise ConfigError(f"data.root={root}: no such folder; expected one with tar files")
    patterns = checked_splits(train, val, samples)
    shards = {key: expanded(folder, key, pattern) for key, pattern in patterns.items()}
    read = {key: read_samples(folder, paths, keys) for key, paths in shards.items()}
    classes = _classes(folder, class_names, [*read.values()])
    splits = {
        key: EncodedSplit(
            images=EncodedImages(part, part.labels, exif_orientation=exif_orientation),
            names=part.names,
            short_names=part.names.beginning_with(""),
        )
        for key, part in read.items()
    }
    return image_set(splits.get("train"), splits["val"], classes, settings)


def _keys(images: object, label: object) -> Keys:
    """Return what members of a sample are called, in small letters as they are compared."""
    names = images if isinstance(images, list | tuple) else []
    for key, some in (("image_keys", names), ("label_key", [label])):
        if not some or not all(isinstance(name, str) and name for name in some):
            value = label if key == "label_key" else images
            raise ConfigError(f"data.{key}={value}: expected extensions, such as jpg or cls")
    return Keys(tuple(name.lower() for name in names), str(label).lower())


def _classes(folder: Path, file: str | None, parts: Sequence[Samples]) -> list[str]:
    """Return the name of every label."""
    number = 1 + max(int(part.labels.max()) for part in parts)
    if file is None:
        return [*map(str, range(number))]
    path = next((p for p in (folder / str(file), Path(str(file))) if p.is_file()), None)
    if path is None:
        raise ConfigError(f"data.class_names={file}: no such file, in {folder} neither")
    try:
        names = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.class_names={file}: cannot be read ({error})") from None
    repeated = sorted({name for name in names if names.count(name) > 1 or not name})
    if repeated:
        raise ConfigError(
            f"data.class_names={file}: expected a name of its own on every line, not "
            f"{first(map(repr, repeated))}"
        )
    if len(names) < number:
        raise ConfigError(
            f"data.class_names={file}: {len(names)} names, and labels up to {number - 1}: expected "
            "a line per class, in the order of their numbers"
        )
    return names
