"""The identity of a run: its resolved recipe, hashes, and the names of its folders."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vitrim.cli.compose import GROUPS, _choice
from vitrim.files import digest
from vitrim.versions import versions

TIMES = ("latency", "latency_ms")  # budgets that hang on where they were measured
NOT_RECIPE = ("out", "tracking", "progress", "latency", "checkpoint", "sweep")
"""Keys that change where and how, not what."""


def _recipe(cfg: DictConfig, fingerprint: str | None, started_from: str | None) -> dict[str, Any]:
    """Return the resolved recipe, its hashes, and the names of its series and run."""
    from vitrim.files import digest

    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    choices = {group: _choice(group) for group in (*GROUPS, "experiment")}
    if cfg.transfer:
        choices["method"] = "transfer"
    addressed = _identifying(resolved, fingerprint, started_from)
    recipe = {"choices": {group: choices[group] for group in ("data", "method")}}
    recipe |= _without_addresses(addressed)
    series = copy.deepcopy(recipe)
    for key in ("strength", "target", "seed"):
        series.pop(key)
        series["method"].pop(key, None)
    series["data"].pop("samples_seed", None)
    chosen = [name for name, keep in resolved["target"].items() if keep is not None]
    point = "-".join(f"{name}{resolved['target'][name]}" for name in chosen) or f"s{cfg.strength:g}"
    label = "-".join(str(choices[group]) for group in ("model", "data", "method"))
    dense = {key: recipe[key] for key in ("model", "data", "trainer", "seed", "checkpoint_sha256")}
    dense["choices"] = {"data": choices["data"]}
    recipe_hash, series_name = digest(recipe), f"{label}-{digest(series)}"
    name = f"{point}-seed{cfg.seed}"
    return {
        "resolved": resolved,
        "hash": recipe_hash,
        "dense_key": digest(dense),
        "start_key": digest([dense, started_from]) if started_from else digest(dense),
        "series": series_name,
        "name": f"{name}-{recipe_hash}",
        "earlier": _earlier(Path(cfg.out), label, name, addressed),
        "report": {
            "choices": choices,
            "strength": None if chosen else cfg.strength,
            "seed": cfg.seed,
            "samples": resolved["data"].get("samples"),
            "recipe_hash": recipe_hash,
            "series": series_name,
            **versions(*(("torchao",) if cfg.quantize else ())),
        },
    }


def _identifying(
    resolved: Mapping[str, Any], fingerprint: str | None, started_from: str | None
) -> dict[str, Any]:
    """Return the part of a resolved recipe that decides the result of the run."""
    recipe = copy.deepcopy({k: v for k, v in resolved.items() if k not in NOT_RECIPE})
    for key in ("quantize", "transfer"):  # folders of runs without them keep their names
        if not recipe[key]:
            del recipe[key]
    for part in (recipe, recipe["method"]):
        if "target" in part:
            part["target"] = {k: v for k, v in part["target"].items() if k not in TIMES or v}
    if any(map(recipe["target"].get, TIMES)):
        recipe["latency"] = {key: resolved["latency"][key] for key in ("batch", "device")}
    if recipe["data"].get("samples") is None:
        drawing = ("samples", "samples_seed")
        recipe["data"] = {key: value for key, value in recipe["data"].items() if key not in drawing}
        recipe["method"].get("sampling", {}).pop("given", None)
    if recipe["data"].get("bad_images", {}).get("evaluation") == "fail":  # judged on all, as ever
        del recipe["data"]["bad_images"]
    recipe["checkpoint_sha256"] = fingerprint
    recipe["from_run"] = started_from
    if started_from is None:
        del recipe["from_run"]
    return recipe


def _without_addresses(node: Any) -> Any:
    """Return `node` without the addresses of classes, which may move."""
    if isinstance(node, dict):
        return {key: _without_addresses(value) for key, value in node.items() if key != "_target_"}
    return [_without_addresses(item) for item in node] if isinstance(node, list) else node


def _earlier(out: Path, label: str, name: str, recipe: Mapping[str, Any]) -> Path | None:
    """Return the folder of this run as version 0.1.0 named it, if it finished there.

    That version hashed the addresses of classes with the recipe.
    """
    for report in sorted(out.absolute().glob(f"{escape(label)}-*/{escape(name)}-*/report.json")):
        folder = report.parent
        try:
            known: Any = yaml.safe_load((folder / "recipe.yaml").read_text())
            begun = _identifying(known, recipe["checkpoint_sha256"], recipe.get("from_run"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
            continue
        same = _without_addresses(begun) == _without_addresses(recipe)
        if same and folder.name == f"{name}-{digest(begun)}":
            return folder
    return None


def _variant() -> str:
    """Return what the command line says of the method, beyond its name."""
    said = [word for word in HydraConfig.get().overrides.task if word.startswith("method.")]
    return " ".join(sorted(word.removeprefix("method.") for word in said))
