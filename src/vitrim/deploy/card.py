"""The model card of an exported network: Markdown with a hub's YAML above it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from huggingface_hub import ModelCardData
from timm import __version__ as timm_version

from vitrim.deploy.runfolder import Source
from vitrim.network import structure
from vitrim.network.skeleton import dense_skeleton
from vitrim.plan import Plan

UNKNOWN = "unknown"
_ROWS = {
    "params": "parameters",
    "macs": "MACs of one image",
    "flops": "FLOPs of one image",
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "latency_ms": "latency (ms)",
}


def model_card(source: Source) -> str:
    """Return README.md: licence, use, what it cost, what was removed, how it was made."""
    name = source.plan.model["name"]
    data = ModelCardData(
        license=licence(source),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "vitrim", "pruning", "compression"],
    )
    title = f"# {name}, compressed by vitrim"
    parts = chain(_use(source), _cost(source), _plan(source.plan), _making(source))
    return "\n".join(["---", data.to_yaml(), "---", "", title, "", *parts])


def licence(source: Source) -> str:
    """Return that of timm's weights of the network, where the run may have begun with them."""
    known: dict[str, Any] = source.net.pretrained_cfg  # type: ignore[assignment]
    if _origin(source).startswith("trained"):
        return UNKNOWN
    return known.get("license") or UNKNOWN


def _origin(source: Source) -> str:
    """Return where the dense weights came from, as far as the run's folder says."""
    model, data = source.recipe.get("model"), source.recipe.get("data", {})
    if model is None:
        return "not recorded"
    if model.get("checkpoint"):
        return "loaded from a checkpoint"
    if data.get("_target_") == "vitrim.data.none":
        return "drawn at random: the network shows a structure and knows nothing"
    return "timm's pretrained ones" if model.get("pretrained") else "trained by the run"


def _use(source: Source) -> Iterator[str]:
    images = source.images
    yield "```python"
    yield "import timm"
    yield "import vitrim  # registers the architecture"
    yield ""
    yield 'net = timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:USER/NAME'
    yield "```"
    yield ""
    yield (
        f"Images: {images.channels} x {images.size[0]} x {images.size[1]}, mean "
        f"{tuple(images.mean)}, std {tuple(images.std)}. Outputs: {source.net.num_classes} logits."
    )
    yield ""


def _cost(source: Source) -> Iterator[str]:
    """Iterate over the table of the dense and the compact network, if there is a report."""
    dense, compact = source.report.get("dense"), source.report.get("compact")
    if not isinstance(dense, dict) or not isinstance(compact, dict):
        return
    yield from ("## What it cost", "", "| | dense | compact |", "|:---|---:|---:|")
    for key, label in _ROWS.items():
        yield f"| {label} | {_number(dense.get(key))} | {_number(compact.get(key))} |"
    yield ""


def _number(value: Any) -> str:
    match value:
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.2f}"
        case _:
            return "-"


def _plan(plan: Plan) -> Iterator[str]:
    """Iterate over what was removed, summed over the blocks."""
    sites = structure(dense_skeleton(plan.model)).sites
    kept: dict[str, list[int]] = {}
    for keep in plan.keeps():
        parts = keep.site.split(".")
        sums = kept.setdefault(".".join(part for part in parts if not part.isdigit()), [0, 0, 0])
        for at, value in enumerate((1, len(keep.index), sites[keep.site].size)):
            sums[at] += value
    yield from ("## What was removed", "", "All of it is in `plan.json`.", "")
    for kind, (places, left, size) in kept.items():
        yield f"* `{kind}`: {left:,} of {size:,} units kept, in {places} places"
    ranks = [edit.rank for edit in plan.low_ranks()]
    if ranks:
        yield f"* {len(ranks)} layers in two factors, of ranks {min(ranks)} to {max(ranks)}"
    dropped = [f"`{edit.branch}`" for edit in plan.drops()]
    if dropped:
        yield f"* dropped: {', '.join(dropped)}"
    if not plan.edits:
        yield "* nothing"
    yield ""


def _making(source: Source) -> Iterator[str]:
    """Iterate over how to make it again, as far as the run's folder says."""
    report = source.report
    yield from ("## How it was made", "", f"Dense weights: {_origin(source)}.", "")
    if "choices" in report:
        yield from ("```", _command(source), "```", "")
        yield "Paths and other settings of the model and the data are not repeated here."
        yield ""
    for key in ("vitrim", "commit", "recipe_hash"):
        if report.get(key):
            yield f"* {key}: {report[key]}"
    versions = report.get("versions") or {"timm": timm_version}
    yield f"* versions: {', '.join(f'{name} {said}' for name, said in versions.items())}"
    yield f"* licence of timm's weights of this name: {_of_timm(source)}"
    yield ""


def _of_timm(source: Source) -> str:
    known: dict[str, Any] = source.net.pretrained_cfg  # type: ignore[assignment]
    return known.get("license") or UNKNOWN


def _command(source: Source) -> str:
    """Return the command of the run, by its choices."""
    report = source.report
    chosen = [f"{group}={name}" for group, name in report["choices"].items() if name is not None]
    if report.get("strength") is None:
        target = report.get("target", {})
        chosen.append(f"target.{target.get('metric')}={target.get('keep')}")
    else:
        chosen.append(f"strength={report['strength']:g}")
    variant = report.get("variant") or ""
    if report["choices"]["method"] != "transfer":  # else it says what was transferred
        chosen += [f"method.{word}" for word in variant.split()]
    return " ".join(["vitrim", *chosen, f"seed={report.get('seed')}"])
