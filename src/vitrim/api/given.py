"""A network at hand as the dense network of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from vitrim.data import ImageSpec
from vitrim.model.identify import Identified
from vitrim.model.source import Timm, takes_any_size
from vitrim.network.proof import input_shape
from vitrim.trainer.recipe import Recipe

_UNTRAINED = Recipe(epochs=0, lr=0.0, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)


@dataclass(frozen=True, kw_only=True)
class Given(Timm):
    """A network with its weights, in place of a name from which it would be built.

    Args:
        net: the plain network on CPU, in eval mode, in float32.
        size: height and width of its images.
    """

    net: nn.Module
    size: tuple[int, int]

    @property
    def has_weights(self) -> bool:
        """Its weights are there."""
        return True

    def build(self, *, fetch: bool = True) -> nn.Module:
        """Return the network itself, which is a copy of the user's already."""
        return self.net

    def spec(self) -> ImageSpec:
        """Return the images that the network gets: of the size at hand, prepared by the user."""
        return replace(Timm.spec(self), size=self.size)


def given(found: Identified, size: tuple[int, int]) -> Given:
    """Return an identified network for images of `size`, (height, width)."""
    args = dict(cast(dict[str, Any], found.model["args"]))
    name = str(found.model["name"])
    return Given(
        name=name,
        pretrained=False,
        checkpoint=None,
        sha256=None,
        num_classes=args.pop("num_classes", None),
        reset_head=False,
        image_size=args.pop("img_size", None),
        mean=None,
        std=None,
        args=args,
        training=_UNTRAINED,
        net=found.net,
        size=size,
    )


def image_shape(found: Identified) -> tuple[tuple[int, int, int], bool]:
    """Return (channels, height, width) of a network's images, and whether any size will do."""
    args = found.model["args"]
    assert isinstance(args, dict)
    dynamic = any(args.get(key) for key in ("dynamic_img_size", "dynamic_img_pad"))
    name = args.get("network", found.model["name"])  # with a head of its own
    return input_shape(found.net), dynamic or takes_any_size(str(name))
