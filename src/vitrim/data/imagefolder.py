"""Folders of images in the layout of ImageNet: `root/train/<class>/*` and `root/val/<class>/*`.

The validation images may lie in one folder, if a file has their labels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitrim.data.class_names import is_numbered, label_index, ordered, split_name
from vitrim.data.few_shot import FewShotSubset, few_shot
from vitrim.data.folders import ImageList, Split, first, read_split
from vitrim.data.image_files import ImageFiles
from vitrim.data.label_files import read_labels
from vitrim.data.loading import DEFAULTS, Loading, LoadingSettings
from vitrim.data.paths import Paths
from vitrim.data.quarantine import BadImageSettings, StrictDataset, TolerantDataset
from vitrim.data.reading import extensions
from vitrim.errors import ConfigError


def image_folder(
    *,
    root: str,
    train: str,
    val: str,
    classes: Sequence[object] | int | None,
    class_seed: int,
    samples: int | None,
    samples_seed: int,
    batch_size: int,
    workers: int | str,
    bad_images: BadImageSettings,
    augmentation: Mapping[str, object],
    mixing: Mapping[str, object],
    val_labels: str | None = None,
    exif_orientation: bool = False,
    loading: LoadingSettings = DEFAULTS,
) -> ImageFiles:
    """Return the images below `root`; the names of the class folders determine the labels.

    Args:
        root: the data set's folder.
        train: the training folder below it; without it, the set is for evaluation only.
        val: the validation folder below it.
        classes: names, or a number that is drawn; None: all. See `vitrim.data.class_names`.
        samples: size of a class-balanced subset of the training images; None: all.
        class_seed: of the draw of classes.
        samples_seed: of the draw of images.
        batch_size: images in a batch.
        bad_images: `limit` of TolerantDataset and `evaluation` of StrictDataset.
        augmentation: training options of timm.data.create_transform.
        mixing: options of timm.data.Mixup.
        val_labels: a file with the labels of validation images that lie in one folder.
        exif_orientation: whether images are turned as their EXIF data says.
        workers: loading processes, or "auto".
        loading: settings of Loading.

    Raises:
        ConfigError: a folder is missing, empty or unreadable, a class does not exist or has no
            image, or only some of the folders are named after wnids.
        BadImages: too many training images, or one to evaluate on, are named after other classes.
    """
    folder, train, val = _split_names(Path(str(root)), train, val)
    splits = _open_splits(folder, train, val, val_labels)
    folders = ordered(name for split in splits.values() for name in split.images)
    index, _ = label_index(folders, classes, class_seed)
    lists = _image_lists(splits, index, exif_orientation=exif_orientation)
    _check_samples(samples, folder / train, found=train in lists)
    tolerant = _tolerant(lists[train], bad_images) if train in lists else None
    used = {label: name for name, label in index.items() if name in folders}
    return ImageFiles(
        train=_drawn(tolerant, folder, used, samples, samples_seed),
        val=_strict(lists[val], bad_images),
        classes=tuple(index),
        batch_size=batch_size,
        loading=Loading(workers=workers, **loading),
        augmentation=augmentation,
        mixing=mixing,
        listing=_listing([*splits.values()], folders),
    )


def _listing(splits: Sequence[Split], folders: Sequence[str]) -> int:
    """Return the version of the rules that find and label these images; 1 where both agree."""
    reordered = is_numbered(folders) and [*folders] != sorted(folders)
    return 2 if reordered or any(split.differs for split in splits) else 1


def _split_names(root: Path, train: object, val: object) -> tuple[Path, str, str]:
    """Return `root`, which must be a folder, and the names of the two folders below it."""
    if not root.is_dir():
        raise ConfigError(
            f"data.root={root}: no such folder; expected {root}/{val}/<class>/<image>"
        )
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    return root, split_name("train", train, folders), split_name("val", val, folders)


def _open_splits(root: Path, train: str, val: str, val_labels: str | None) -> dict[str, Split]:
    """Return the validation split and, if it exists, the training split, by folder name."""
    splits = {name: read_split(root / name) for name in (train, val) if (root / name).is_dir()}
    if val not in splits:
        folders = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise ConfigError(f"data.val={val}: no folder {root / val}; {root} contains {folders}")
    for split in splits.values():
        if split.loose and split is not splits[val] and not split.images:
            raise ConfigError(
                f"{split.folder}: {len(split.loose):,} images without class folders "
                f"({_names(split.loose)}): expected {split.folder}/<class>/<image>"
            )
    splits[val] = _labelled(splits[val], splits.get(train), val_labels, root)
    return splits


def _labelled(split: Split, train: Split | None, labels: str | None, root: Path) -> Split:
    """Return the validation images by class, which `labels` says where they are in one folder."""
    if labels is None:
        if split.loose and not split.images:
            raise ConfigError(
                f"{split.folder}: {len(split.loose):,} images without class folders "
                f"({_names(split.loose)}): data.val_labels=FILE names a file of their labels, "
                "with lines of FILE,CLASS, or with a label per line in the order of their names"
            )
        return split
    path = next(
        (p for p in (Path(str(labels)), root / str(labels)) if p.is_file()), Path(str(labels))
    )
    images = sorted([*split.loose, *(image for part in split.images.values() for image in part)])
    if not images:
        raise ConfigError(f"{split.folder}: contains no image")
    names = read_labels(path, images, [] if train is None else ordered(train.images))
    by_class: dict[str, list[str]] = {name: [] for name in sorted({*names.values()})}
    for image in images:
        by_class[names[image]].append(image)
    return replace(split, images=by_class, loose=())


def _names(paths: Sequence[str]) -> str:
    return first(Path(path).name for path in paths)


def _image_lists(
    splits: Mapping[str, Split], index: Mapping[str, int], *, exif_orientation: bool
) -> dict[str, ImageList]:
    """Return the images of the classes that are used, with their labels, by split."""
    lists = {}
    for name, split in splits.items():
        used = [folder for folder in split.images if folder in index]
        _check_images(splits, split, used)
        images = {folder: split.images[folder] for folder in used}
        if not any(images.values()):
            raise ConfigError(
                f"{split.folder}: contains no image of the requested classes (data.classes)"
            )
        prefix = f"{split.folder}{os.sep}"
        paths = Paths.joined([_as_paths(part, prefix) for part in images.values()])
        labels = np.repeat([index[f] for f in images], [*map(len, images.values())])
        targets = labels.astype(np.int32)
        lists[name] = ImageList(paths, targets, exif_orientation=exif_orientation)
    return lists


def _as_paths(images: Sequence[str], prefix: str) -> Paths:
    return images if isinstance(images, Paths) else Paths.of(images, prefix=prefix)


def _check_images(splits: Mapping[str, Split], split: Split, used: Sequence[str]) -> None:
    """Refuse a class whose files are no images in this split, or that has no image at all."""
    for folder in used:
        if not split.images[folder] and folder in split.unread:
            raise ConfigError(
                f"{split.folder / folder}: class {folder} has no image that can be read, only "
                f"files of {split.unread[folder]}: expected {', '.join(extensions())}; convert "
                "them, or list the other classes in data.classes"
            )
    empty = [folder for folder in used if not any(s.images.get(folder) for s in splits.values())]
    if empty and any(split.images.values()):
        raise ConfigError(
            f"{split.folder}: class folders without any image: {first(empty)}; remove them, or "
            "list the other classes in data.classes"
        )


def _tolerant(images: ImageList, settings: BadImageSettings) -> TolerantDataset:
    return TolerantDataset(
        images, labels=images.targets, names=images.paths, limit=settings["limit"]
    )


def _strict(images: ImageList, settings: BadImageSettings) -> StrictDataset:
    return StrictDataset(
        images, labels=images.targets, names=images.paths, evaluation=settings["evaluation"]
    )


def _check_samples(samples: int | None, folder: Path, *, found: bool) -> None:
    """Raise ConfigError if images are to be drawn from a folder that does not exist."""
    if samples is not None and not found:
        raise ConfigError(f"data.samples={samples}: no folder {folder}")


def _drawn(
    images: TolerantDataset | None,
    root: Path,
    classes: Mapping[int, str],
    samples: int | None,
    seed: int,
) -> TolerantDataset | FewShotSubset | None:
    """Return the training images, or the subset of them if `samples` says how many to draw."""
    if images is None or samples is None:
        return images
    assert isinstance(images.names, Paths)
    folder = Path(images.names.prefix).relative_to(root).as_posix()
    names: Sequence[str] = images.names.beginning_with(f"{folder}/")
    if os.sep != "/":
        names = [name.replace(os.sep, "/") for name in names]
    return few_shot(
        images, classes=classes, labels=images.labels, names=names, samples=samples, seed=seed
    )
