"""What a run's folder says of its network: the net itself, its images, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from timm.data import resolve_model_data_config
from torch import nn
from yaml import YAMLError

from vitrim.data import ImageSpec
from vitrim.files import StoreError
from vitrim.plan import Plan
from vitrim.store import load


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A network that a run left, in float32, and what is known of it.

    `recipe` and `report` are recipe.yaml and report.json, empty where the folder has none.
    """

    net: nn.Module
    plan: Plan
    images: ImageSpec
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]


def read(folder: Path, *, image_size: int | None = None) -> Source:
    """Return what is in the folder of a run, or in one that `vitrim.save` wrote.

    Args:
        folder: where plan.json, model.safetensors and manifest.json are.
        image_size: the side of the images in pixels; by default as the run had them.

    Raises:
        StoreError: a file is missing, damaged or malformed.
        PlanError: the plan is malformed.
    """
    net, plan = load(folder)
    recipe = _document(
        folder / "recipe.yaml", lambda path: OmegaConf.to_container(OmegaConf.load(path))
    )
    report = _document(folder / "report.json", lambda path: json.loads(path.read_text()))
    said = {key: value for key, value in recipe.get("model", {}).items() if value is not None}
    if image_size is not None:
        said["image_size"] = image_size
    return Source(
        net=net.float(),
        plan=plan,
        images=_images(net, plan, said),
        recipe=recipe,
        report=report,
    )


def _document(path: Path, parse: Callable[[Path], Any]) -> dict[str, Any]:
    """Return the mapping in a file, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = parse(path)
    except (ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise StoreError(f"{path} cannot be read: expected keys and values")
    return found


def _images(net: nn.Module, plan: Plan, said: Mapping[str, Any]) -> ImageSpec:
    """Return what images the network wants: as timm says, but for what the run set."""
    config = resolve_model_data_config(net)
    args = plan.model["args"]
    channels, height, width = config["input_size"]
    size = said.get("image_size", args.get("img_size", (height, width)))
    return ImageSpec(
        channels=args.get("in_chans", channels),
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=said.get("mean", config["mean"]),
        std=said.get("std", config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )
