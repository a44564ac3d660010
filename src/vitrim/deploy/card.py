"""The model card of an exported network: Markdown below the YAML that model hubs read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from huggingface_hub import ModelCardData
from timm import __version__ as timm_version

from vitrim.deploy.saved import SavedNetwork
from vitrim.deploy.table import markdown_table
from vitrim.files import escape
from vitrim.network import structure
from vitrim.network.skeleton import shared_skeleton
from vitrim.plan import Plan

UNKNOWN = "unknown"
_MAX_CLASSES = 10
"""Names of outputs that a card lists; config.json has all."""
_ROWS = {
    "params": "parameters",
    "macs": "MACs of one image",
    "flops": "FLOPs of one image",
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "latency_ms": "latency (ms)",
}


def model_card(saved: SavedNetwork) -> str:
    """Return README.md: licence, usage, measurements, what was removed, how it was made."""
    name = saved.plan.model["name"]
    data = ModelCardData(
        license=escape.yaml(licence(saved)),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "vitrim", "pruning", "compression"],
    )
    title = f"# {escape.cell(name)}, compressed by vitrim"
    sections = chain(_usage(saved), _measurements(saved), _edits(saved.plan), _origin(saved))
    return "\n".join(["---", data.to_yaml(), "---", "", title, "", *sections])


def licence(saved: SavedNetwork) -> str:
    """Return the licence of timm's weights; unknown where the run trained its own."""
    if _dense_weights(saved).startswith("trained"):
        return UNKNOWN
    return _timm_licence(saved)


def _timm_licence(saved: SavedNetwork) -> str:
    return saved.timm_config.get("license") or UNKNOWN


def _dense_weights(saved: SavedNetwork) -> str:
    """Return where the dense weights came from, as far as the run's folder says."""
    model, data = saved.recipe.get("model"), saved.recipe.get("data", {})
    if model is None:
        return "not recorded"
    if model.get("checkpoint"):
        return "loaded from a checkpoint"
    if data.get("_target_") == "vitrim.data.none":
        return "random: the network has the structure only and predicts nothing"
    return "timm's pretrained ones" if model.get("pretrained") else "trained by the run"


def _usage(saved: SavedNetwork) -> Iterator[str]:
    images, names = saved.images, ", ".join(saved.classes[:_MAX_CLASSES])
    names += ", ..." if len(saved.classes) > _MAX_CLASSES else ""
    yield "```python"
    yield "import timm"
    yield "import vitrim  # registers the architecture"
    yield ""
    yield 'net = timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:USER/NAME'
    yield "```"
    yield ""
    yield (
        f"Images: {images.channels} x {images.size[0]} x {images.size[1]}, mean "
        f"{tuple(images.mean)}, std {tuple(images.std)}. Outputs: {saved.net.num_classes} logits"
        f"{f' ({names})' if names else ''}."
    )
    yield ""


def _measurements(saved: SavedNetwork) -> Iterator[str]:
    """Iterate over the table of the dense and the compact network, if there is a report."""
    dense, compact = saved.report.get("dense"), saved.report.get("compact")
    if not isinstance(dense, dict) or not isinstance(compact, dict):
        return
    rows = [[label, _number(dense.get(k)), _number(compact.get(k))] for k, label in _ROWS.items()]
    table = markdown_table([["", "dense", "compact"], *rows], left=1)
    yield from ("## What it cost", "", *table, "")


def _number(value: object) -> str:
    match value:
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.2f}"
        case _:
            return "-"


def _edits(plan: Plan) -> Iterator[str]:
    """Iterate over what was removed, summed over the blocks."""
    sites = structure(shared_skeleton(plan.model)).sites
    sums: dict[str, tuple[int, int, int]] = {}
    for keep in plan.keeps():
        path = ".".join(part for part in keep.site.split(".") if not part.isdigit())
        n_sites, kept, size = sums.get(path, (0, 0, 0))
        sums[path] = (n_sites + 1, kept + len(keep.index), size + sites[keep.site].size)
    yield from ("## What was removed", "", "The complete list is in `plan.json`.", "")
    for path, (n_sites, kept, size) in sums.items():
        yield f"* {escape.code(path)}: {kept:,} of {size:,} units kept, in {n_sites} sites"
    ranks = [edit.rank for edit in plan.low_ranks()]
    if ranks:
        yield f"* {len(ranks)} layers in two factors, of ranks {min(ranks)} to {max(ranks)}"
    dropped = [escape.code(edit.branch) for edit in plan.drops()]
    if dropped:
        yield f"* dropped: {', '.join(dropped)}"
    if not plan.edits:
        yield "* nothing"
    yield ""


def _origin(saved: SavedNetwork) -> Iterator[str]:
    """Iterate over how to reproduce the network, as far as the run's folder says."""
    report = saved.report
    yield from ("## How it was made", "", f"Dense weights: {_dense_weights(saved)}.", "")
    if isinstance(report.get("choices"), dict):
        yield from ("```", _command(saved), "```", "")
        yield "Paths and other settings of the model and the data are not repeated here."
        yield ""
    for key in ("vitrim", "commit", "recipe_hash"):
        if report.get(key):
            yield f"* {key}: {escape.cell(report[key])}"
    known = report.get("versions")
    versions = known if isinstance(known, dict) and known else {"timm": timm_version}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"* versions: {escape.cell(listed)}"
    yield f"* licence of timm's weights of this name: {escape.cell(_timm_licence(saved))}"
    yield ""


def _command(saved: SavedNetwork) -> str:
    """Return the command of the run, from the choices in its report."""
    report = saved.report
    words = [f"{group}={name}" for group, name in report["choices"].items() if name is not None]
    if report.get("strength") is None:
        target = report.get("target", {})
        words.append(f"target.{target.get('metric')}={target.get('keep')}")
    else:
        words.append(f"strength={report['strength']:g}")
    if report["choices"].get("method") != "transfer":  # its variant names the run it began with
        words += [f"method.{word}" for word in str(report.get("variant") or "").split()]
    return " ".join(["vitrim", *map(escape.word, words), f"seed={report.get('seed')}"])
