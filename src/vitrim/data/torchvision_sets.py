"""Flowers-102 (Nilsback and Zisserman, 2008) and Oxford-IIIT Pets (2012) through torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torchvision.datasets import Flowers102, OxfordIIITPet, VisionDataset

from vitrim.data.dataset import ImageDataset
from vitrim.data.few_shot import few_shot
from vitrim.data.folders import ImageList
from vitrim.data.image_files import ImageFiles
from vitrim.data.loading import DEFAULTS, Loading, LoadingSettings
from vitrim.data.paths import Paths, labels_of
from vitrim.data.quarantine import BadImageSettings, StrictDataset, TolerantDataset
from vitrim.errors import ConfigError

_SETS: Mapping[str, tuple[Callable[..., VisionDataset], tuple[str, ...]]] = {
    "flowers102": (Flowers102, ("train", "val")),
    "pets": (OxfordIIITPet, ("trainval",)),
}
"""The class of each set, and the splits for training; the split "test" is for validation."""


def _joined(parts: Sequence[VisionDataset], *, exif_orientation: bool) -> ImageList:
    """Return the images of several splits as one set."""
    samples = [
        (str(path), int(label))
        for part in parts
        for path, label in zip(_image_paths(part), part._labels, strict=True)
    ]
    paths = Paths.of(path for path, _ in samples)
    targets = labels_of((label for _, label in samples), len(samples))
    return ImageList(paths, targets, exif_orientation=exif_orientation)


def _image_paths(part: VisionDataset) -> Sequence[object]:
    """Return the paths of a set's images without opening any."""
    paths: Sequence[object] = part._image_files if isinstance(part, Flowers102) else part._images
    return paths


def torchvision_set(
    *,
    name: str,
    root: str,
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
    """Return the set `name` below `root`; `download=True` downloads it once.

    `samples` is the size of a class-balanced random subset of the training images, drawn by
    `samples_seed`; None uses all of them. `exif_orientation` turns images as their EXIF data says.

    Raises:
        ConfigError: no set has that name, its files are missing or damaged, or there are fewer
            images than `samples`.
    """
    parts, test = _open(name, root, download=download)
    classes = parts[0].classes
    train, val = (_joined(p, exif_orientation=exif_orientation) for p in (parts, test))
    tolerant = TolerantDataset(
        train, labels=train.targets, names=train.paths, limit=bad_images["limit"]
    )
    selected: ImageDataset = tolerant
    if samples is not None:
        selected = few_shot(
            tolerant,
            classes=dict(enumerate(classes)),
            labels=train.targets,
            names=[f"train/{index:05}" for index in range(len(train))],
            samples=samples,
            seed=samples_seed,
        )
    return ImageFiles(
        train=selected,
        val=StrictDataset(
            val, labels=val.targets, names=val.paths, evaluation=bad_images["evaluation"]
        ),
        classes=tuple(classes),
        batch_size=batch_size,
        loading=Loading(workers=workers, **loading),
        augmentation=augmentation,
        mixing=mixing,
    )


def _open(
    name: str, root: str, *, download: bool
) -> tuple[Sequence[VisionDataset], Sequence[VisionDataset]]:
    """Return the splits for training and for validation of the set `name`."""
    if name not in _SETS:
        raise ConfigError(f"data.name={name}: expected {' or '.join(_SETS)}")
    dataset, training_splits = _SETS[name]
    try:
        train, val = (
            [dataset(str(root), split=split, download=download) for split in splits]
            for splits in (training_splits, ("test",))
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"data.root={root}: no {name} ({error}); "
            "put its files there, or download them with data.download=true"
        ) from None
    return train, val
