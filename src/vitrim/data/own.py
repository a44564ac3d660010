"""Data sets of other packages: what they offer, and how a run reads it.

A run accepts three kinds:

* an object with the members of `vitrim.data.Data`, which is taken as it is;
* a LightningDataModule (`vitrim.data.data_module`);
* an object whose `splits()` returns a training and a validation set of labelled images, such as
  two splits of Hugging Face's `datasets` (`vitrim.data.splits`).
"""

from __future__ import annotations

from typing import cast

from lightning import LightningDataModule

from vitrim.data import Data
from vitrim.data.data_module import ModuleData
from vitrim.data.splits import HasSplits, image_splits
from vitrim.errors import ConfigError

_MODULE = "LightningDataModule"


def is_data_module(kind: type) -> bool:
    """Whether a class is a LightningDataModule, of `lightning` or of `pytorch_lightning`."""
    return any(base.__name__ == _MODULE for base in kind.__mro__)


def as_data(value: object) -> Data | None:
    """Return a data set as a run reads it; None where there is none.

    Raises:
        ConfigError: it is none of the three kinds, or lacks something.
    """
    match value:
        case None | Data():
            return value
        case HasSplits():
            return image_splits(value)
    if is_data_module(type(value)):
        return ModuleData.of(cast(LightningDataModule, value))
    raise ConfigError(
        f"data: {type(value).__name__} is no data set: expected the members of vitrim.data.Data "
        f"(n_classes, trainable, sample_names, module), a {_MODULE}, or splits(), which returns "
        "labelled images for training and for validation (vitrim.data.own)"
    )
