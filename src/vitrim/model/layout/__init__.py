"""Layouts of weights: how other libraries name and arrange the tensors of a network.

A `Layout` recognises a state dict by a few of its keys, and maps it to timm's names. What timm
converts itself (the hubs of DeiT, DINOv2 and DINOv3, OpenAI's CLIP, Microsoft's Swin) is only
recognised here, and converted by `vitrim.model.conversion`.

May import: the rest of `vitrim.model`, and what it may import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from vitrim.model.layout import hubs, huggingface, torchvision
from vitrim.model.layout.keys import Layout, without_text_tower

LAYOUTS: tuple[Layout, ...] = (*huggingface.LAYOUTS, *torchvision.LAYOUTS, *hubs.LAYOUTS)
"""All layouts; the first that recognises a state dict is the one it has."""
NAMES = {layout.name: layout for layout in LAYOUTS}
_NEAREST = 3


def layout_of(state: Mapping[str, Tensor]) -> Layout | None:
    """Return the layout of a state dict; None: none of those that are known.

    >>> layout_of({"conv_proj.weight": Tensor(), "other": Tensor()}) is None
    True
    """
    keys = without_text_tower(state)
    return next((layout for layout in LAYOUTS if not layout.missing(keys)), None)


def nearest(keys: Iterable[str]) -> str:
    """Return a phrase with the three layouts that lack the smallest share of what marks them."""
    keys = without_text_tower(keys)
    shares = [(len(one.missing(keys)) / len(one.marks), one) for one in LAYOUTS]
    best = sorted(shares, key=lambda pair: pair[0])[:_NEAREST]
    return "; ".join(f"{one.name} (lacks {', '.join(one.missing(keys)[:3])})" for _, one in best)
