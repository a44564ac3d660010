"""The recipe of a run: what of its configuration decides the result."""

from __future__ import annotations

import copy
from typing import cast

from vitrim.cli.checks import Config

LATENCY_TARGETS = ("latency", "latency_ms")
"""Targets that depend on where they were measured."""
NOT_RECIPE = ("out", "tracking", "progress", "latency", "checkpoint", "sweep")
"""Keys that change where and how a run works, not its result."""

ADDED = {"data.val_labels": None, "data.exif_orientation": False, "method.metric": "units"}
"""Keys that later versions added, with the values by which earlier ones acted."""


def identifying(resolved: Config, fingerprint: str | None, started_from: str | None) -> Config:
    """Return the part of a resolved recipe that decides the result of the run.

    Addresses of classes are no part of it, so that a class can move.
    """
    recipe = cast(Config, _without_unset_batches(without_addresses(resolved)))
    recipe = {key: value for key, value in recipe.items() if key not in NOT_RECIPE}
    if not recipe["quantize"]:  # folders of runs without it keep their names
        del recipe["quantize"]
    targets = recipe["target"]
    recipe["target"] = {k: v for k, v in targets.items() if k not in LATENCY_TARGETS or v}
    if any(map(targets.get, LATENCY_TARGETS)):
        recipe["latency"] = {key: resolved["latency"][key] for key in ("batch", "device")}
    data, sampling = recipe["data"], recipe["method"].get("sampling", {})
    if data.get("samples") is None:
        for key in ("samples", "samples_seed"):
            data.pop(key, None)
        sampling.pop("available_images", None)
    if data.get("bad_images", {}).get("evaluation") == "fail":  # evaluated on all, as ever
        del data["bad_images"]
    for key, value in ADDED.items():
        group, _, name = key.partition(".")
        if recipe[group].get(name) == value:
            recipe[group].pop(name, None)
    recipe["checkpoint_sha256"] = fingerprint
    del recipe["from_run"]
    if started_from is not None:
        recipe["from_run"] = started_from
    return recipe


def without_addresses(node: object) -> object:
    """Return a copy of `node` without the addresses of classes."""
    if isinstance(node, dict):
        return {key: without_addresses(value) for key, value in node.items() if key != "_target_"}
    return [without_addresses(item) for item in node] if isinstance(node, list) else node


def _without_unset_batches(node: object) -> object:
    """Return a copy of `node` without the `reference_batch` of trainings whose lr is not scaled.

    Such trainings are as they were before there was that key.
    """
    if isinstance(node, dict):
        return {
            key: _without_unset_batches(value)
            for key, value in node.items()
            if key != "reference_batch" or value is not None
        }
    return [_without_unset_batches(item) for item in node] if isinstance(node, list) else node


def of_series(recipe: Config) -> Config:
    """Return what the runs of a series share: all but budget, seed and the draw of images."""
    series = copy.deepcopy(recipe)
    for key in ("strength", "target", "seed"):
        del series[key]
    series.pop("revision", None)  # which the seed may decide
    series["method"].pop("seed", None)
    series["data"].pop("samples_seed", None)
    return series
