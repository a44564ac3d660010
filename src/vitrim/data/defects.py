"""What makes an image bad: it cannot be decoded, or its name says another class.

Files that cannot be decoded are truncated, empty, no image, or beyond Pillow's limit against
decompression bombs. A name says another class in `n01440764/n02102040_7.JPEG`. Grey, CMYK, palette,
16-bit and transparent images are not bad (`vitrim.data.reading`).
"""

from __future__ import annotations

import errno
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL.Image import DecompressionBombError

from vitrim.data.dataset import Example, LabelledImages
from vitrim.errors import VitrimError

WNID = re.compile(r"n\d{8}")
_OTHER_WNID = re.compile(rf"[/\\]({WNID.pattern})[/\\](?!\1){WNID.pattern}_[^/\\]*\Z")
_DECODING_ERRORS = (
    *(ValueError, TypeError, ArithmeticError, LookupError, SyntaxError, EOFError, RuntimeError),
    *(AttributeError, struct.error, zlib.error, DecompressionBombError),
)
"""What decoders raise for damaged contents, apart from OSError."""
_FILE_ERRNOS = (None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)
"""Numbers of an OSError that the file causes and not the machine; Pillow's errors have none."""


class BadImages(VitrimError):
    """Images that a run cannot use and does not accept."""

    def __init__(self, message: str) -> None:
        # a worker process puts its traceback in front of the message
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def decode(dataset: LabelledImages, index: int, name: str) -> Example | str:
    """Return the image and label of `dataset` at `index`, or the reason why the image is bad.

    Raises:
        BadImages: the machine failed to read the file, which does not make the image bad.
    """
    try:
        return dataset[index]
    except OSError as error:
        if error.errno not in _FILE_ERRNOS:
            raise BadImages(
                f"{name}: could not be read (machine error, not a bad image): {error}"
            ) from None
        return _one_line(error)
    except _DECODING_ERRORS as error:
        return _one_line(error)


def mislabelled(names: Sequence[str]) -> list[int]:
    """Return the indices of files whose name begins with another wnid than their folder's.

    >>> mislabelled(["train/n01440764/n01440764_1.JPEG", "train/n01440764/n02102040_7.JPEG"])
    [1]
    """
    return [index for index, name in enumerate(names) if _OTHER_WNID.search(name)]


def bad_indices(dataset: LabelledImages, names: Sequence[str]) -> list[int]:
    """Decode every image and return the indices of the bad ones, ascending."""
    misnamed = set(mislabelled(names))
    with ThreadPoolExecutor() as pool:
        damaged = pool.map(
            lambda index: isinstance(decode(dataset, index, names[index]), str), range(len(names))
        )
        return [index for index, is_bad in enumerate(damaged) if is_bad or index in misnamed]


def defect_reasons(
    dataset: LabelledImages, indices: Iterable[int], names: Sequence[str]
) -> dict[str, str]:
    """Return why the images at `indices`, all of them bad, are bad, by name."""
    outcomes = {names[index]: decode(dataset, index, names[index]) for index in indices}
    return {
        name: outcome if isinstance(outcome, str) else "named after another class"
        for name, outcome in outcomes.items()
    }


def listed(reasons: Mapping[str, str]) -> str:
    """Return a line for every bad image, to follow a message."""
    return "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
