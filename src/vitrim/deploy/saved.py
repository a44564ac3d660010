"""The network in a run folder, and what the folder says about it, for exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from timm.data import resolve_model_data_config
from torch import nn

from vitrim.data import ImageSpec
from vitrim.deploy.runfolder import (
    REPORT,
    Document,
    folder_of_run,
    read_classes,
    read_recipe,
    read_report,
    read_run,
)
from vitrim.plan import Plan
from vitrim.store import load


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedNetwork:
    """The compact network of a run, in float32, and what its folder says about it.

    `recipe` and `report` are recipe.yaml and report.json, empty where the folder has none;
    `timm_config` is timm's description of the dense weights.
    """

    net: nn.Module
    plan: Plan
    images: ImageSpec
    recipe: Document
    report: Document
    timm_config: Document

    @property
    def classes(self) -> list[str]:
        """The names of the outputs, in order; empty where the report does not name all of them."""
        names = self.report.get("classes", [])
        fits = isinstance(names, list) and len(names) == self.net.num_classes
        return [str(name) for name in names] if fits else []


def read_network(folder: Path, *, image_size: int | None = None) -> SavedNetwork:
    """Load the network in the folder of a run, or in one that `vitrim.save` wrote.

    Args:
        folder: where plan.json, model.safetensors and manifest.json are.
        image_size: the side of the images in pixels; by default as the run had them.

    Raises:
        StoreError: a file is missing, damaged or malformed.
        PlanError: the plan is malformed.
    """
    net, plan = load(folder)
    recipe = read_recipe(folder)
    report: Document = {}
    if (folder / REPORT).exists():
        read_run(folder)  # refuses what cannot be shown in a card
        report = read_report(folder)
    elif folder_of_run(folder) != folder:
        report = {"classes": read_classes(folder_of_run(folder))}
    preparation = {
        key: value for key, value in recipe.get("model", {}).items() if value is not None
    }
    if image_size is not None:
        preparation["image_size"] = image_size
    return SavedNetwork(
        net=net.float(),
        plan=plan,
        images=_image_spec(net, plan, preparation),
        recipe=recipe,
        report=report,
        timm_config=cast(Document, net.pretrained_cfg),
    )


def _image_spec(net: nn.Module, plan: Plan, preparation: Document) -> ImageSpec:
    """Return what images the network takes: as timm says, but for what the run set."""
    config = resolve_model_data_config(net)
    args = plan.model["args"]
    channels, height, width = config["input_size"]
    size = preparation.get("image_size", args.get("img_size", (height, width)))
    return ImageSpec(
        channels=args.get("in_chans", channels),
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=preparation.get("mean", config["mean"]),
        std=preparation.get("std", config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )
