"""Folders of images in the layout of ImageNet: `root/train/<class>/*` and `root/val/<class>/*`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder

from vitrim.data.few_shot import Few, few
from vitrim.data.images import Images
from vitrim.data.quarantine import WNID, Replacing, strict
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
    bad_images: Mapping[str, Any],
    augmentation: Mapping[str, Any],
    mixing: Mapping[str, Any],
) -> Images:
    """Return the images below `root`, labels settled by folder name and never by folder rank.

    Args:
        root: the data set's folder.
        train: the training folder below it; without it, the set can only be evaluated on.
        val: the validation folder below it.
        classes: None takes every folder: labels are ImageNet's 0..999 where all names are wnids of
            ImageNet-1k (folders may be missing), else ranks among the names of both splits. A list
            of names takes these; a number draws that many, as ImageNet-100 is drawn. Labels are
            then ranks among the sorted names.
        class_seed: seed of that draw.
        samples: how many training images are used, alike of all classes that have a folder; None:
            all.
        samples_seed: seed of that draw.
        batch_size: images in a batch.
        workers: loading processes.
        bad_images: `limit` and `evaluation` of vitrim.data.quarantine.
        augmentation: training options of timm.data.create_transform.
        mixing: options of timm.data.Mixup.

    Raises:
        ConfigError: a folder is missing, empty or unreadable, a class does not exist, or the name
            of some folders, but not of all, is a wnid.
        BadImages: too many training images, or one to evaluate on, are named after other classes.
    """
    if not Path(root).is_dir():
        raise ConfigError(
            f"data.root={root}: no such folder; expected {root}/{val}/<class>/<image>"
        )
    splits = {
        name: _open(Path(root) / name) for name in (train, val) if (Path(root) / name).is_dir()
    }
    if val not in splits:
        found = ", ".join(sorted(path.name for path in Path(root).iterdir())[:5]) or "nothing"
        raise ConfigError(f"data.val={val}: no folder {Path(root) / val}; {root} holds {found}")
    present = sorted({name for images in splits.values() for name in images.classes})
    index, n_classes = label_index(present, classes, class_seed)
    for name, images in splits.items():
        _relabel(images, index)
        if not images.samples:
            raise ConfigError(f"{Path(root) / name}: no image of the classes asked for")
    tolerated: Replacing | None = None
    if train in splits:
        tolerated = Replacing(splits[train], **_named(splits[train]), limit=bad_images["limit"])
    drawn: Replacing | Few | None = tolerated
    if samples is not None:
        if tolerated is None:
            raise ConfigError(f"data.samples={samples}: no folder {Path(root) / train} to draw of")
        named = {index[name]: name for name in present if name in index}
        drawn = _few(tolerated, Path(root), named, samples, samples_seed)
    return Images(
        train=drawn,
        val=strict(splits[val], **_named(splits[val]), evaluation=bad_images["evaluation"]),
        n_classes=n_classes,
        batch_size=batch_size,
        workers=workers,
        augmentation=augmentation,
        mixing=mixing,
    )


def _few(images: Replacing, root: Path, classes: Mapping[int, str], samples: int, seed: int) -> Few:
    names = [Path(path).relative_to(root).as_posix() for path in images.names]
    return few(
        images, classes=classes, labels=images.labels, names=names, samples=samples, seed=seed
    )


def _named(images: ImageFolder) -> dict[str, Any]:
    return {"labels": images.targets, "names": [path for path, _ in images.samples]}


def label_index(
    present: Sequence[str], classes: Sequence[str] | int | None, class_seed: int
) -> tuple[dict[str, int], int]:
    """Return the label of every class folder in use, and how many labels there are."""
    if classes is None:
        wnids = ImageNetInfo("imagenet-1k").label_names()
        chosen = wnids if set(present) <= set(wnids) else present
        others = [name for name in present if not WNID.fullmatch(name)]
        if 0 < len(others) < len(present):
            raise ConfigError(
                f"data.root: these folders among others are no wnids: {others[:3]}; remove them, "
                "or list the classes to use in data.classes"
            )
    elif isinstance(classes, int):
        if not 1 <= classes <= len(present):
            raise ConfigError(
                f"data.classes={classes}: expected 1 to {len(present)}, the class folders there are"
            )
        chosen = random.Random(class_seed).sample(sorted(present), classes)
    else:
        missing = sorted(set(classes) - set(present))
        if missing or not classes:
            raise ConfigError(
                f"data.classes: no folder for {missing[:3]}; there are {', '.join(present[:3])} ..."
            )
        chosen = list(classes)
    return {name: label for label, name in enumerate(sorted(set(chosen)))}, len(set(chosen))


def _open(folder: Path) -> ImageFolder:
    try:
        return ImageFolder(str(folder), allow_empty=True)
    except OSError as error:
        raise ConfigError(f"{folder}: no readable class folders there ({error})") from None


def _relabel(images: ImageFolder, index: Mapping[str, int]) -> None:
    """Give every image the label of its folder's name; images of other classes leave the set."""
    samples = [
        (path, index[images.classes[rank]])
        for path, rank in images.samples
        if images.classes[rank] in index
    ]
    images.samples = images.imgs = samples
    images.targets = [label for _, label in samples]
    images.class_to_idx = dict(index)
    images.classes = sorted(index)
