"""Images that lie in larger files, as those of a table or of a tar: decoded when asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol, cast

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitrim.data.dataset import Example
from vitrim.data.paths import Labels
from vitrim.data.reading import checked_exif, decode_image, decode_pixels


class ImageFile(Protocol):
    """The contents of image files by index, which worker processes and threads may ask for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...

    def size(self, index: int, /) -> int:
        """Return the bytes of one; -1 where it cannot be found."""
        ...


class EncodedImages(Dataset[Example]):
    """Images of files in a larger one, with their labels.

    With `exif_orientation` images are turned as their EXIF data says. With `as_pixels` they are
    tensors (3, H, W) in uint8, and not Pillow's.
    """

    as_pixels = False

    def __init__(self, files: ImageFile, targets: Labels, *, exif_orientation: bool) -> None:
        self.files = files
        self.targets = cast(Sequence[int], targets)
        self._exif_orientation = checked_exif(exif_orientation)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return self.decoded(self.files[index]), int(self.targets[index])

    def decoded(self, content: bytes) -> Image.Image | Tensor:
        """Return the image that a file contains."""
        if self.as_pixels:
            return decode_pixels(content, exif_orientation=self._exif_orientation)
        return decode_image(io.BytesIO(content), exif_orientation=self._exif_orientation)
