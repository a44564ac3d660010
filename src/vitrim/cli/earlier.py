"""Runs that version 0.1.0 finished, found by the command that would run them again.

That version hashed the addresses of classes with the recipe, and had other names for many keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import cast

import yaml

from vitrim.cli.checks import Config
from vitrim.cli.recipe import LATENCY_TARGETS, NOT_RECIPE, identifying
from vitrim.cli.renamed import RENAMED_VALUES, present_key
from vitrim.files import digest

CONSTANTS: Config = {
    "batchnorm_images": 512,
    "method.power_iterations": 30,
    "method.step_margin": 1.1,
    "method.init_std": 0.02,
    "method.synthetic.betas": [0.5, 0.9],
    "method.synthetic.batch_size": 50,
    "method.group_size": 1,
    "method.saving": "macs",
    "method.latency_repeats": 10,
    "method.adaptor_training.iterations": 1000,
    "method.adaptor_training.lr": 0.02,
    "method.adaptor_training.momentum": 0.9,
    "method.adaptor_training.weight_decay": 1.0e-4,
    "method.adaptor_training.decay_every": 0.4,
    "method.adaptor_training.decay": 0.1,
    "method.trial.views": "plain",
    "method.drop_mlps": False,
}
"""Numbers that stood in the code of 0.1.0, by the keys that they have now, and the defaults of keys
that it had not and that do not matter for what it did."""


def earlier_run(out: Path, label: str, point: str, recipe: Config) -> Path | None:
    """Return the folder of a run as version 0.1.0 named it, if it finished there.

    Args:
        out: root of the run folders.
        label: names of model, data and method.
        point: strength or target, and seed.
        recipe: what decides the result of this run.
    """
    for report in sorted(out.glob(f"{escape(label)}-*/{escape(point)}-*/report.json")):
        folder = report.parent
        try:
            known = cast(Config, yaml.safe_load((folder / "recipe.yaml").read_text()))
            named = f"{point}-{digest(_identifying_then(known, recipe))}"
            if folder.name == named and _translated(known, recipe) == recipe:
                return folder
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
            continue
    return None


def _identifying_then(resolved: Config, recipe: Config) -> Config:
    """Return what 0.1.0 hashed of a resolved recipe, with the digests of the present run."""
    hashed = copy.deepcopy({key: v for key, v in resolved.items() if key not in NOT_RECIPE})
    for key in ("quantize", "transfer"):
        if not hashed[key]:
            del hashed[key]
    for part in (hashed, hashed["method"]):
        part["target"] = {k: v for k, v in part["target"].items() if k not in LATENCY_TARGETS or v}
    if any(map(hashed["target"].get, LATENCY_TARGETS)):
        hashed["latency"] = {key: resolved["latency"][key] for key in ("batch", "device")}
    if hashed["data"].get("samples") is None:
        drawing = ("samples", "samples_seed")
        hashed["data"] = {key: v for key, v in hashed["data"].items() if key not in drawing}
        hashed["method"].get("sampling", {}).pop("given", None)
    if hashed["data"].get("bad_images", {}).get("evaluation") == "fail":
        del hashed["data"]["bad_images"]
    hashed["checkpoint_sha256"] = recipe["checkpoint_sha256"]
    del hashed["from_run"]
    if "from_run" in recipe:
        hashed["from_run"] = recipe["from_run"]
    return hashed


def _translated(resolved: Config, recipe: Config) -> Config:
    """Return the recipe of 0.1.0 with the keys and values of this version."""
    former = copy.deepcopy(resolved)
    if former.pop("transfer"):
        former["method"] = {"training": former["model"]["training"]}
    for key in ("strength", "target", "name"):
        former["method"].pop(key, None)
    present = dict(_leaves(recipe))
    translated: Config = {}
    for key, value in _leaves(former):
        name = key if key in present else present_key(key)
        now = RENAMED_VALUES.get((name, value)) if isinstance(value, str | bool) else None
        _put(translated, name, now or value)
    known = dict(_leaves(translated))
    for key, value in CONSTANTS.items():
        if key not in known and any(name == key or name.startswith(f"{key}.") for name in present):
            _put(translated, key, value)
    method = translated.get("method", {})
    if "method.seed" in present and recipe["choices"]["data"] != "none":
        method.setdefault("seed", former["seed"])  # it now decides what is removed without images
    part = identifying(translated, recipe["checkpoint_sha256"], recipe.get("from_run"))
    return part | {"choices": recipe["choices"]}


def _leaves(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Iterate over the values of a nested recipe that are no mappings, by dotted key."""
    if not isinstance(node, dict) or not node:
        yield key, node
        return
    for name, child in node.items():
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


def _put(node: Config, key: str, value: object) -> None:
    """Set a value in a nested recipe by its dotted key."""
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
