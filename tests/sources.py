"""A small network of timm as a configuration names it."""

from __future__ import annotations

from typing import Any

from nets import MODEL, TINY
from vitrim.model.source import Timm
from vitrim.trainer.recipe import Recipe

RECIPE = Recipe.__new__(Recipe)
"""A recipe for models that are not trained."""


def source(**changes: Any) -> Timm:
    arguments: dict[str, Any] = {
        "name": MODEL["name"],
        "pretrained": False,
        "checkpoint": None,
        "sha256": None,
        "num_classes": 5,
        "reset_head": False,
        "image_size": 32,
        "mean": None,
        "std": None,
        "args": {key: TINY[key] for key in TINY if key not in ("num_classes", "img_size")},
        "training": RECIPE,
    }
    return Timm(**arguments | changes)
