"""The tables of README.md from results/*.json: the methods, and eight measured rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .measured import Kept, table

ARXIV = "https://arxiv.org/abs/"


class Line(NamedTuple):
    """A measured row: the line of a file that has these values, and the number that is shown."""

    file: str
    has: Mapping[str, object]
    shown: str
    network: str = "ViT-Ti"


LINES = {
    "joint": Line("joint_vit_tiny", {"target_macs": 0.6836}, "top1"),
    "joint at half": Line("joint_vit_tiny", {"target_macs": 0.5}, "top1"),
    "vtp": Line("vtp_cifar10_tiny", {"budget": "strength=2"}, "top1", "ViT-Ti, CIFAR-10"),
    "oneshot": Line("oneshot_vit_tiny_sites", {"kept_macs_percent": 78.9}, "top1_mlp_and_qk"),
    "mixed_rank": Line(
        "mixed_rank_vit_tiny", {"variant": "with sequential regression (default)"}, "top1_at_80"
    ),
    "dcvit": Line("dcvit_vit_tiny", {"target_blocks": 1}, "top1_dcvit"),
    "practise": Line("few_mobilenetv2_blocks", {"method": "practise"}, "top1", "MobileNetV2"),
    "fskd": Line("few_mobilenetv2", {"channels_removed_percent": 10}, "top1_fskd", "MobileNetV2"),
    "cd": Line("few_mobilenetv2", {"channels_removed_percent": 10}, "top1_cd", "MobileNetV2"),
    "aiminify": Line(
        "aiminify_structures",
        {"experiment": "aiminify/vit_base", "strength": 5.0},
        "params",
        "ViT-B",
    ),
}


class About(NamedTuple):
    """A row of the table of methods."""

    names: str
    page: str
    paper: str
    removes: str
    images: str
    labels: str
    trains: str
    line: str


METHODS = [
    About(*(cell.strip() for cell in row.split("|")))
    for row in """
joint | joint | ours | units, heads, branches, ranks, digits | 1000 | no | each MLP | joint
oneshot | methods/oneshot | OB2C, CORP | units, heads, channels | 1000 | no | nothing | oneshot
mixed_rank | methods/mixed_rank | 2402.06004 | ranks of layers | 1000 | no | nothing | mixed_rank
dcvit | methods/dcvit | 2403.18708 | attentions, MLP units | 50 to 1000 | no | features | dcvit
practise, mir | methods/practise | 2202.07861, 2201.02620 | blocks | 500 | no | features | practise
fskd | methods/fskd | 1812.01839 | MLP units, channels | 100 | no | nothing | fskd
cd | methods/cd | 1911.09450 | MLP units, channels | 100 | if trained | all, optional | cd
vtp | methods/vtp | 2104.08500 | inputs, dims, MLP units | all | yes | gates, then all | vtp
aiminify | methods/aiminify | a blog | MLP units | all | yes | all | aiminify
""".strip().splitlines()
]
SHOWN = (
    ("joint", "`joint`", "1000 images"),
    ("joint at half", "`joint`", "1000 images"),
    ("oneshot", "`oneshot`, MLP units and qk", "1000 images"),
    ("mixed_rank", "`mixed_rank`", "1000 images"),
    ("dcvit", "`dcvit`", "500 images"),
    ("vtp", "`vtp`", "labels"),
    ("cd", "`cd`, not fine-tuned", "100 images"),
    ("aiminify", "`aiminify`, structure", "no images"),
)


def tables(kept: Kept) -> dict[str, str]:
    """Return the generated parts of README.md by name."""
    head = ["method", "source", "removes", "images", "labels", "trains", "a row of ours: top-1"]
    methods = [head, *(_method(kept, about) for about in METHODS)]
    head = ["method", "network", "needs", "what remains", "dense", "top-1", "file"]
    rows = [head, *(_row(kept, *shown) for shown in SHOWN)]
    return {"methods": table(methods), "results": table(rows)}


def dense_top1(kept: Kept, line: Line) -> float | None:
    """Return the top-1 of the dense network of a row; None where no image was looked at."""
    data = kept[line.file]["data"]
    if line.network == "MobileNetV2":
        return float(data.partition("(")[2].partition(" %")[0])
    if line.network == "ViT-Ti":
        return float(_found(kept, Line("joint_vit_tiny", {"target_macs": 1}, "top1"))["top1"])
    return None if line.shown == "params" else float(kept[line.file]["figures"][0]["top1"])


def remaining(kept: Kept, line: Line) -> str:
    """Return what a row keeps of its network."""
    found = _found(kept, line)
    if line.shown == "params":
        return f"{found['params']:,} params"
    if "channels_removed_percent" in found:
        return f"{100 - found['channels_removed_percent']} % of the channels"
    if line.file == "mixed_rank_vit_tiny":
        return f"{kept[line.file]['figures'][0][line.shown]} % of the MACs"
    return f"{found['kept_macs_percent']} % of the MACs"


def _method(kept: Kept, about: About) -> list[str]:
    line = LINES[about.line]
    papers = ", ".join(
        f"[{paper}]({ARXIV}{paper})" if paper[0].isdigit() else paper
        for paper in about.paper.split(", ")
    )
    names = ", ".join(f"`{name}`" for name in about.names.split(", "))
    names = f"[{names}](docs/{about.page}.md)"
    cells = [names, papers, about.removes, about.images, about.labels, about.trains]
    return [*cells, _summary(kept, line)]


def _summary(kept: Kept, line: Line) -> str:
    link = f"docs/results.md#{line.file}"
    if line.shown == "params":
        return f"[structures only]({link})"
    top1, dense = _found(kept, line)[line.shown], dense_top1(kept, line)
    return f"[{top1:.1f} of {dense:.1f}]({link}) at {remaining(kept, line)}"


def _row(kept: Kept, name: str, method: str, needs: str) -> list[str]:
    line = LINES[name]
    dense = dense_top1(kept, line)
    top1 = "-" if dense is None else f"{_found(kept, line)[line.shown]:.1f}"
    link = f"[{line.file}](docs/results.md#{line.file})"
    dense_text = "-" if dense is None else f"{dense:.1f}"
    return [method, line.network, needs, remaining(kept, line), dense_text, top1, link]


def _found(kept: Kept, line: Line) -> Mapping[str, Any]:
    """Return the first line of a file that has the values of a row."""
    lines = kept[line.file]["figures"]
    return next(found for found in lines if found.items() >= line.has.items())
