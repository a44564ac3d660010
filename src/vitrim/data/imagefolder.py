"""Folders of images in the layout of ImageNet: `root/train/<class>/*` and `root/val/<class>/*`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder

from vitrim.data.defects import WNID
from vitrim.data.few_shot import FewShotSubset, few_shot
from vitrim.data.image_files import ImageFiles
from vitrim.data.quarantine import BadImageSettings, StrictDataset, TolerantDataset
from vitrim.errors import ConfigError


def image_folder(
    *,
    root: str,
    train: str,
    val: str,
    classes: Sequence[str] | int | None,
    class_seed: int,
    samples: int | None,
    samples_seed: int,
    batch_size: int,
    workers: int,
    bad_images: BadImageSettings,
    augmentation: Mapping[str, object],
    mixing: Mapping[str, object],
) -> ImageFiles:
    """Return the images below `root`; the names of the class folders determine the labels.

    Args:
        root: the data set's folder.
        train: the training folder below it; without it, the set is for evaluation only.
        val: the validation folder below it.
        classes: None takes every folder: labels are ImageNet's 0..999 where all names are wnids of
            ImageNet-1k (folders may be missing), else ranks among the names of both splits. A list
            of names takes these; a number draws that many, as for ImageNet-100. Labels are then
            ranks among the sorted names.
        class_seed: of that draw.
        samples: size of a class-balanced random subset of the training images; None: all.
        samples_seed: of that draw.
        batch_size: images in a batch.
        workers: loading processes.
        bad_images: `limit` of TolerantDataset and `evaluation` of StrictDataset.
        augmentation: training options of timm.data.create_transform.
        mixing: options of timm.data.Mixup.

    Raises:
        ConfigError: a folder is missing, empty or unreadable, a class does not exist, or only some
            of the folders are named after wnids.
        BadImages: too many training images, or one to evaluate on, are named after other classes.
    """
    splits = _open_splits(Path(root), train, val)
    names = sorted({name for images in splits.values() for name in images.classes})
    index, n_classes = label_index(names, classes, class_seed)
    for split, images in splits.items():
        _relabel(images, index, Path(root) / split)
    tolerant = _tolerant(splits[train], bad_images) if train in splits else None
    few: FewShotSubset | None = None
    if samples is not None:
        if tolerant is None:
            raise ConfigError(f"data.samples={samples}: no folder {Path(root) / train}")
        used = {index[name]: name for name in names if name in index}
        few = _few_shot(tolerant, Path(root), used, samples, samples_seed)
    return ImageFiles(
        train=tolerant if few is None else few,
        val=_strict(splits[val], bad_images),
        n_classes=n_classes,
        batch_size=batch_size,
        workers=workers,
        augmentation=augmentation,
        mixing=mixing,
    )


def _open_splits(root: Path, train: str, val: str) -> dict[str, ImageFolder]:
    """Return the validation split and, if it exists, the training split, by folder name."""
    if not root.is_dir():
        raise ConfigError(
            f"data.root={root}: no such folder; expected {root}/{val}/<class>/<image>"
        )
    splits = {name: _open(root / name) for name in (train, val) if (root / name).is_dir()}
    if val not in splits:
        folders = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise ConfigError(f"data.val={val}: no folder {root / val}; {root} contains {folders}")
    return splits


def _open(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder), allow_empty=True)
    except OSError as error:
        raise ConfigError(f"{folder}: contains no readable class folders ({error})") from None


def _relabel(images: ImageFolder, index: Mapping[str, int], folder: Path) -> None:
    """Give every image the label of its folder's name and remove images of other classes."""
    samples = [
        (path, index[images.classes[rank]])
        for path, rank in images.samples
        if images.classes[rank] in index
    ]
    if not samples:
        raise ConfigError(f"{folder}: contains no image of the requested classes (data.classes)")
    images.samples = images.imgs = samples
    images.targets = [label for _, label in samples]
    images.class_to_idx = dict(index)
    images.classes = sorted(index)


def _tolerant(images: ImageFolder, settings: BadImageSettings) -> TolerantDataset:
    return TolerantDataset(
        images, labels=images.targets, names=_paths(images), limit=settings["limit"]
    )


def _strict(images: ImageFolder, settings: BadImageSettings) -> StrictDataset:
    return StrictDataset(
        images, labels=images.targets, names=_paths(images), evaluation=settings["evaluation"]
    )


def _paths(images: ImageFolder) -> list[str]:
    return [path for path, _ in images.samples]


def _few_shot(
    images: TolerantDataset, root: Path, classes: Mapping[int, str], samples: int, seed: int
) -> FewShotSubset:
    names = [Path(path).relative_to(root).as_posix() for path in images.names]
    return few_shot(
        images, classes=classes, labels=images.labels, names=names, samples=samples, seed=seed
    )


def label_index(
    folders: Sequence[str], classes: Sequence[str] | int | None, class_seed: int
) -> tuple[dict[str, int], int]:
    """Return the label of every class that is used, and the number of labels."""
    if classes is None:
        names = _all_classes(folders)
    elif isinstance(classes, int):
        if not 1 <= classes <= len(folders):
            raise ConfigError(
                f"data.classes={classes}: expected 1 to {len(folders)}, the number of class folders"
            )
        names = random.Random(class_seed).sample(sorted(folders), classes)
    else:
        missing = sorted(set(classes) - set(folders))
        if missing or not classes:
            raise ConfigError(
                f"data.classes: no folder for {missing[:3]}; there are {', '.join(folders[:3])} ..."
            )
        names = classes
    return {name: label for label, name in enumerate(sorted(set(names)))}, len(set(names))


def _all_classes(folders: Sequence[str]) -> Sequence[str]:
    """Return the classes of ImageNet-1k if all folders are among them, else the folders."""
    wnids: Sequence[str] = ImageNetInfo("imagenet-1k").label_names()
    others = [name for name in folders if not WNID.fullmatch(name)]
    if 0 < len(others) < len(folders):
        raise ConfigError(
            f"data.root: some folders are named after wnids, these are not: {others[:3]}; remove "
            "them, or list the classes to use in data.classes"
        )
    return wnids if set(folders) <= set(wnids) else folders
