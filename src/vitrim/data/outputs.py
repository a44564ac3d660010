"""The labels of a data set as the outputs of a network.

Both have names: those of a data set are its class folders, those of a network are in the report of
the run that made it. Where no names are known, the number of outputs decides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from vitrim.data import Data
from vitrim.data.class_names import imagenet_wnids, is_ambiguous, is_numbered
from vitrim.data.folders import first
from vitrim.data.image_files import ImageFiles
from vitrim.errors import ConfigError

_log = logging.getLogger(__name__)


@runtime_checkable
class Named(Protocol):
    """A data set that names its classes, in the order of their labels."""

    @property
    def classes(self) -> Sequence[str]:
        """The name of every label."""
        ...


def class_names(data: Data | None) -> tuple[str, ...]:
    """Return the names of the labels of a data set; empty where it has none."""
    return tuple(data.classes) if isinstance(data, Named) else ()


def report_entry(data: Data | None) -> dict[str, list[str]]:
    """Return the report's entry: the names of the network's outputs, if the data set has any."""
    names = [*class_names(data)]
    return {"classes": names} if names else {}


def listing(data: Data | None) -> int:
    """Return the version of the rules by which the images of a data set are found and labelled."""
    return data.listing if isinstance(data, ImageFiles) else 1


def evaluated(data: Data) -> Data:
    """Return a data set for evaluation only: classes without validation images do not count."""
    return data.evaluation_only() if isinstance(data, ImageFiles) else data


def n_present(data: Data) -> int:
    """Return the number of classes that have images."""
    return len(data.present) if isinstance(data, ImageFiles) else data.n_classes


def listed(data: Data) -> str:
    """Return the number of classes and the first names, for messages.

    >>> from types import SimpleNamespace
    >>> listed(SimpleNamespace(n_classes=2, classes=("cat", "dog")))
    '2 classes (cat, dog)'
    """
    names = class_names(data)
    return f"{data.n_classes} classes{f' ({first(names)})' if names else ''}"


def for_network(
    data: Data, n_outputs: int, *, known: Sequence[str] = (), loaded: bool, owner: str
) -> Data:
    """Return `data` with the outputs of a network as labels; unchanged where they do not fit.

    Args:
        data: any data set; only those of image files can have other labels.
        n_outputs: of the network.
        known: names of its outputs; empty where they are not recorded.
        loaded: whether its classifier is loaded, so that its outputs have a meaning.
        owner: what the network is, for messages.

    Raises:
        ConfigError: the network does not know a class, or the order of the classes is ambiguous.
    """
    if not isinstance(data, ImageFiles):
        names = class_names(data)
        if known and names and tuple(known) != names:
            raise ConfigError(
                f"the classes are {first(names)}, those of {owner} are {first(known)}: choose the "
                "data set of that network"
            )
        return data
    if known:
        return data.relabelled(known, outputs_by_name(data.present, known, owner=owner))
    wnids = imagenet_wnids()
    if loaded and n_outputs == len(wnids) and {*data.present} <= {*wnids}:
        return data.relabelled(wnids, [wnids.index(name) for name in data.present])
    return _by_number(data, n_outputs, loaded=loaded, owner=owner)


def _by_number(data: ImageFiles, n_outputs: int, *, loaded: bool, owner: str) -> ImageFiles:
    """Return images with labels for so many outputs without names."""
    present = data.present
    if data.n_classes != n_outputs and len(present) == n_outputs:
        data = data.relabelled(present, [*range(n_outputs)])
    if data.n_classes != n_outputs and loaded:
        numbers = [*map(str, range(n_outputs))]
        if {*present} <= {*numbers}:
            return data.relabelled(numbers, [int(name) for name in present])
    if loaded and data.n_classes == n_outputs and is_ambiguous(data.classes):
        raise ConfigError(
            f"data.root: the class folders {first(data.classes)} may be ordered as texts or as "
            f"numbers, and {owner} does not say how: rename them with leading zeros, in the order "
            "of its outputs"
        )
    return data


def outputs_by_name(names: Sequence[str], outputs: Sequence[str], *, owner: str) -> list[int]:
    """Return the output of a network that each class has, by name.

    A number is the index of an output where no output is named by a number, and stands for a wnid
    of ImageNet-1k where the outputs are numbers 0 to 999 (ImageNetV2).

    Args:
        names: of the classes.
        outputs: names of the network's outputs, in order.
        owner: whose outputs, for the message.

    Raises:
        ConfigError: the network does not know a class.
    """
    indices = {name: index for index, name in enumerate(outputs)}
    strangers = [name for name in names if name not in indices]
    if strangers == [*names]:
        numbers = {str(index): index for index in range(len(outputs))}
        wnids = {wnid: index for index, wnid in enumerate(imagenet_wnids())}
        if set(names) <= numbers.keys() and not set(outputs) & numbers.keys():
            indices, strangers = numbers, []
            _log.warning("class folders %s: taken as numbers of outputs", first(names))
        elif is_numbered(outputs) and len(outputs) == len(wnids) and set(names) <= wnids.keys():
            indices, strangers = wnids, []
    if strangers:
        raise ConfigError(
            f"classes that {owner} does not know: {first(strangers)}; it knows {first(outputs)}: "
            "rename them, or list the others in data.classes"
        )
    return [indices[name] for name in names]
