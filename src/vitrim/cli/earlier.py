"""Runs that earlier versions finished, found by the command that would run them again.

Version 0.1.0 hashed the addresses of classes with the recipe, and had other names for many keys.
Until version 0.2.0 paths and settings of speed were hashed as well.
"""

from __future__ import annotations

import copy
from glob import escape
from pathlib import Path
from typing import cast

from vitrim.cli.checks import Config
from vitrim.cli.recipe import (
    DAMAGED,
    LATENCY_TARGETS,
    PLACES,
    Contents,
    drop_added,
    identifying,
    leaves,
    without_addresses,
)
from vitrim.cli.renamed import RENAMED_VALUES, present_key
from vitrim.files import digest, read_yaml

_NOT_HASHED = ("out", "tracking", "progress", "latency", "checkpoint", "sweep")
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


def earlier_run(
    out: Path, label: str, point: str, recipe: Config, resolved: Config, contents: Contents
) -> Path | None:
    """Return the folder of a run as an earlier version named it, if it finished there.

    Args:
        out: root of the run folders.
        label: names of model, data and method.
        point: strength or target, and seed.
        recipe: what decides the result of this run.
        resolved: the configuration of this run.
        contents: of its paths.
    """
    for report in sorted(out.glob(f"{escape(label)}-*/{escape(point)}-*/report.json")):
        folder = report.parent
        try:
            known = cast(Config, read_yaml(folder / "recipe.yaml"))
            by_0_1_0 = "transfer" in known
            hashed = _identifying_then if by_0_1_0 else _identifying_with_paths
            named = f"{point}-{digest(hashed(known, recipe))}"
            if folder.name != named or _place(known) != _place(resolved):
                continue
            present = _translated(known, resolved, images=contents.images is not None)
            if identifying(present, contents) | {"choices": recipe["choices"]} == recipe:
                return folder
        except DAMAGED:
            continue
    return None


def _place(resolved: Config) -> list[object]:
    """Return where the images are: the recipes of earlier versions do not say what they contain."""
    return [resolved["data"].get(key) for key in PLACES]


def _identifying_then(resolved: Config, recipe: Config) -> Config:
    """Return what version 0.1.0 hashed of a resolved recipe, with digests of the present run."""
    hashed = copy.deepcopy({key: v for key, v in resolved.items() if key not in _NOT_HASHED})
    for key in ("quantize", "transfer"):
        if not hashed[key]:
            del hashed[key]
    for part in (hashed, hashed["method"]):
        part["target"] = {k: v for k, v in part["target"].items() if k not in LATENCY_TARGETS or v}
    return _hashed(hashed, resolved, recipe, available="given")


def _identifying_with_paths(resolved: Config, recipe: Config) -> Config:
    """Return what was hashed between version 0.1.0 and the replacement of paths by contents."""
    plain = cast(Config, without_addresses(resolved))
    hashed = {key: value for key, value in plain.items() if key not in _NOT_HASHED}
    if not hashed["quantize"]:
        del hashed["quantize"]
    hashed["target"] = {k: v for k, v in hashed["target"].items() if k not in LATENCY_TARGETS or v}
    hashed["choices"] = recipe["choices"]
    return _hashed(hashed, resolved, recipe, available="available_images")


def _hashed(hashed: Config, resolved: Config, recipe: Config, *, available: str) -> Config:
    """Return what both versions hashed alike; `available`: the key of the few images."""
    if any(map(hashed["target"].get, LATENCY_TARGETS)):
        hashed["latency"] = {key: resolved["latency"][key] for key in ("batch", "device")}
    if hashed["data"].get("samples") is None:
        for key in ("samples", "samples_seed"):
            hashed["data"].pop(key, None)
        hashed["method"].get("sampling", {}).pop(available, None)
    if hashed["data"].get("bad_images", {}).get("evaluation") == "fail":
        del hashed["data"]["bad_images"]
    drop_added(hashed)
    hashed["checkpoint_sha256"] = recipe["checkpoint_sha256"]
    del hashed["from_run"]
    return hashed | ({"from_run": recipe["from_run"]} if "from_run" in recipe else {})


def _translated(known: Config, resolved: Config, *, images: bool) -> Config:
    """Return the recipe of an earlier version with the keys and values of this version.

    Args:
        known: the recipe.
        resolved: that of the present run.
        images: whether there are images.
    """
    former = copy.deepcopy(known)
    if former.pop("transfer", None):
        former["method"] = {"training": former["model"]["training"]}
    if "transfer" in known:
        for key in ("strength", "target", "name"):
            former["method"].pop(key, None)
    present = dict(leaves(resolved))
    translated: Config = {}
    for key, value in leaves(former):
        name = key if key in present else present_key(key)
        now = RENAMED_VALUES.get((name, value)) if isinstance(value, str | bool) else None
        _put(translated, name, now or value)
    for key, value in CONSTANTS.items():
        is_new = not _has(dict(leaves(translated)), key)
        if is_new and _has(present, key):
            _put(translated, key, value)
    if "method.seed" in present and images:
        method = translated.setdefault("method", {})
        method.setdefault("seed", former["seed"])  # it now decides what is removed without images
    return translated


def _has(flat: Config, key: str) -> bool:
    """Whether a dotted key is in a flat recipe, itself or with keys below it."""
    return any(name == key or name.startswith(f"{key}.") for name in flat)


def _put(node: Config, key: str, value: object) -> None:
    """Set a value in a nested recipe by its dotted key."""
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
