"""Whether a run repeats a published row: its weights, data set, evaluated images and recipe.

Numbers of a run that differs in one of these are not shown next to the published ones. A run
without images has no accuracy: it repeats the structure of a row, for which only the network and
the method count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vitrim.deploy.runfolder import Record
from vitrim.paper import Published


class Images(NamedTuple):
    """A data set as runs name it: `data=` of the command line, classes and validation images."""

    name: str
    classes: int
    evaluated: int


DATASETS: Mapping[str, Images] = {
    "ImageNet-1K": Images("imagefolder", 1000, 50_000),
    "ImageNet-100": Images("imagefolder", 100, 5_000),
    "CIFAR-10": Images("cifar10", 10, 10_000),
    "CIFAR-100": Images("cifar100", 100, 10_000),
    "Flowers": Images("flowers102", 102, 6_149),
    "Pets": Images("pets", 37, 3_669),
    "CUB-200": Images("cub200", 200, 5_794),
    "Indoor67": Images("indoor67", 67, 1_340),
}
"""What the data sets of published rows that have a command of ours are."""

WEIGHTS: Mapping[str, str] = {
    "deit_base": "deit_base_patch16_224.fb_in1k",
    "deit_small": "deit_small_patch16_224.fb_in1k",
    "dinov2_vits14_lc": "dinov2_vits14_lc",
    "mobilenetv2": "mobilenetv2_100.ra_in1k",
    "resnet34": "resnet34.a1_in1k",
    "swin_base": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "vit_base": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_large": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
}
"""The weights of timm that rows of a network (`model=`) start from, with the tag of timm 1.0."""

_FREE = (
    *("experiment", "model", "method", "data", "trainer", "strength", "seed", "quantize", "target"),
    *("data.root", "data.train", "data.val", "data.val_labels", "data.workers", "data.download"),
    *("data.samples_seed", "from_run"),
    *("model.pretrained", "model.checkpoint", "model.sha256"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.log_every_n_steps", "trainer.check_val_every_n_epoch"),
    *("trainer.enable_model_summary", "trainer.num_sanity_val_steps"),
    *("latency", "checkpoint", "sweep", "out", "tracking", "progress", "optimized_metric", "wandb"),
)
"""Keys of a command line that do not change the recipe, or that are compared on their own."""
_WITH_CHILDREN = ("target", "latency", "checkpoint", "sweep")


def differences(record: Record, row: Published) -> list[str]:
    """Return in what a run differs from the published row that it has the choices of.

    Each is one of weights, data set, evaluated images and recipe, with the run's and the expected
    value; what a report of an earlier version does not record counts as different.
    """
    if record.get("compact.top1") is None:
        return list(_of_recipe(record, row, structure=True))
    return [
        *_of_weights(record, row),
        *_of_images(record, row),
        *_of_recipe(record, row, structure=False),
    ]


def _of_weights(record: Record, row: Published) -> Iterator[str]:
    if "from_run=" in row.overrides:  # those of another run, which it compares with
        return
    expected = WEIGHTS.get(str(record["choices.model"]))
    source, name = record.get("weights.source"), record.get("weights.name")
    if source is None or record.get("weights.sha256") is None:
        yield f"weights: {'not recorded' if source is None else source}, not timm's {expected}"
    elif source != "timm" or name != expected:
        digest = str(record["weights.sha256"])[:12]
        yield f"weights: {name} ({source}, SHA-256 {digest}), not timm's {expected}"


def _of_images(record: Record, row: Published) -> Iterator[str]:
    expected = DATASETS.get(row.dataset.partition(" (")[0])
    if expected is None:
        yield f"data set: {record.get('choices.data')}, not {row.dataset}"
        return
    name = record.get("dataset.name", record.get("choices.data"))
    classes = record.get("dataset.classes")
    if (name, classes) != (expected.name, expected.classes) or not record.get("dataset.content"):
        known = "not recorded" if classes is None else f"{name} with {classes} classes"
        yield f"data set: {known}, not {row.dataset}"
    evaluated = record.get("evaluated_images")
    if evaluated != expected.evaluated:
        known = "not recorded" if evaluated is None else f"{evaluated:,}"
        yield f"evaluated images: {known}, not {expected.evaluated:,}"


def _of_recipe(record: Record, row: Published, *, structure: bool) -> Iterator[str]:
    """Iterate over the options of the run that are not those of the row; of a structure: model."""
    if not structure and record.get("choices.experiment") != row.experiment:
        yield f"recipe: not experiment={row.experiment}"
    words = record.get("overrides")
    if not isinstance(words, list) or record.get("recipe_hash") is None:
        if not structure:
            yield "recipe: not recorded"
        return
    known = set(row.overrides.split())
    for word in map(str, words):
        key = word.lstrip("+~").partition("=")[0]
        is_free = key in _FREE or key.partition(".")[0] in _WITH_CHILDREN
        if is_free or word in known or key.startswith("method."):  # `match` compares the method's
            continue
        if not structure or key.startswith(("model.", "model@")):
            yield f"recipe: {word}"
