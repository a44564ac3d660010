"""The class folders of a split, and the image files in them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitrim.data.dataset import Example
from vitrim.data.listing import Listing, remembered
from vitrim.data.paths import Labels, Paths
from vitrim.data.reading import checked_exif, extensions, is_new, read_image, read_pixels
from vitrim.errors import ConfigError

_log = logging.getLogger(__name__)
_SYSTEM = ("__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN")
"""Folders that operating systems and network drives make."""
FIRST = 5
"""Names that a message lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The images of one split.

    Args:
        folder: that holds the class folders.
        images: paths by class folder, in the order of their names.
        unread: the extensions of other files, by class folder.
        loose: paths of images outside of class folders.
        differs: whether version 0.1.0 would have listed other images.
    """

    folder: Path
    images: Mapping[str, Sequence[str]]
    unread: Mapping[str, str]
    loose: Sequence[str]
    differs: bool


class ImageList(Dataset[Example]):
    """Images by path, with their labels; each is decoded when it is asked for.

    With `exif_orientation` images are turned as their EXIF data says. With `as_pixels` they are
    tensors (3, H, W) in uint8, and not Pillow's.
    """

    as_pixels = False

    def __init__(self, paths: Sequence[str], targets: Labels, *, exif_orientation: bool) -> None:
        self.paths = paths
        self.targets = cast(Sequence[int], targets)
        self._exif_orientation = checked_exif(exif_orientation)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        return self.loader(self.paths[index]), int(self.targets[index])

    def loader(self, path: str) -> Image.Image | Tensor:
        """Return the image of a file."""
        read = read_pixels if self.as_pixels else read_image
        return read(path, exif_orientation=self._exif_orientation)


def read_split(folder: Path) -> Split:
    """List the images of a split; hidden folders and those of the system are no classes.

    The listing of many images is kept, and read again while no folder has changed
    (`vitrim.data.listing`).

    Raises:
        ConfigError: the folder cannot be read.
    """
    try:
        found = remembered(folder, extensions(), lambda: _listing(folder))
    except OSError as error:
        raise ConfigError(f"{folder}: contains no readable class folders ({error})") from None
    if found.ignored:
        _log.warning("%s: %s: no class, ignored", folder, first(found.ignored))
    if any(found.others.values()):
        in_all = sum(map(Counter, found.others.values()), Counter[str]())
        _log.warning("%s: no images, ignored: %s", folder, _counted(in_all))
    images, end = {}, 0
    for name, number in found.classes.items():
        images[name] = found.paths[end : end + number]
        end += number
    return Split(
        folder=folder,
        images=images,
        unread={name: _counted(Counter(other)) for name, other in found.others.items() if other},
        loose=found.loose,
        differs=found.differs,
    )


def _listing(folder: Path) -> Listing:
    """List the class folders of a split, one after the other."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    ignored = [name for name in folders if _is_ignored(name)]
    prefix, parts, directories = f"{folder}{os.sep}", {}, [str(folder)]
    others, differs = {}, bool(ignored)
    for name in folders:
        if _is_ignored(name):
            continue
        walk = [*_walk(folder / name, directories)]
        files = [path for path, hidden in walk if not hidden]
        images = [path for path in files if is_image(path)]
        others[name] = dict(_extensions(files))
        differs = differs or any(is_image(path) for path, hidden in walk if hidden)
        differs = differs or any(map(is_new, images))
        parts[name] = Paths.of(images, prefix=prefix)
    return Listing(
        paths=Paths.joined([*parts.values()]),
        classes={name: len(part) for name, part in parts.items()},
        directories=directories,
        ignored=ignored,
        others=others,
        loose=[e.path for e in entries if not e.is_dir() and is_image(e.path)],
        differs=differs,
    )


def is_image(path: str) -> bool:
    """Whether the name of a file is that of an image, which is not hidden."""
    return path.lower().endswith(extensions())


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def _walk(folder: Path, directories: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield the path of every file below `folder`, in order, and whether it is hidden.

    The folders that are read are added to `directories`.
    """
    for root, _, names in sorted(os.walk(folder, followlinks=True, onerror=_raise)):
        directories.append(root)
        hidden = any(map(_is_ignored, Path(root).relative_to(folder).parts))
        for name in sorted(names):
            yield f"{root}{os.sep}{name}", hidden or _is_ignored(name)


def _raise(error: OSError) -> NoReturn:
    raise error


def _extensions(paths: Iterable[str]) -> Counter[str]:
    """Return the extensions of the files that are no images."""
    return Counter(Path(path).suffix or "no extension" for path in paths if not is_image(path))


def _counted(extensions: Counter[str]) -> str:
    return ", ".join(f"{extension} ({n:,})" for extension, n in extensions.most_common(FIRST))


def first(names: Iterable[str]) -> str:
    """Return the first of some names, for a message.

    >>> first("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    names = [*names]
    more = len(names) - FIRST
    return ", ".join(names[:FIRST]) + (f" and {more:,} more" if more > 0 else "")
