"""docs/results.md from results/*.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Kept = Mapping[str, Mapping[str, Any]]
"""Files of results/ by name."""

_WORDS = {
    "top1": "top-1",
    "macs": "MACs",
    "flops": "FLOPs",
    "kl": "KL",
    "mlp": "MLP",
    "qk": "qk",
    "dcvit": "DC-ViT",
    "practise": "PRACTISE",
    "fskd": "FSKD",
    "cd": "CD",
    "s": "s",
}
INTRODUCTION = """# Results

Every table on this page is one file of `results/`, with its command, commit, versions, data,
hardware and seed. `python -m tests.pages` writes the page from these files, and a test fails
where they differ. `vitrim-report --paper` prints them as well. A dash means not measured.

**Real weights.** ViT-Ti is timm's ViT-Ti/16 (augreg, ImageNet) on 650 ImageNet validation images.
The dense network has 82.0 % top-1 and 96.2 % top-5 there, labels by wnid (`vitrim model=vit_tiny
model.checkpoint=VIT_TINY data=imagefolder data.root=IMAGES strength=0`). These images are easier
than the full validation set, where the checkpoint's published figure is about 75.5. Use these
numbers for side-by-side comparisons only. One standard error of 650 images is 1.5 points.

Replace words in capitals in the commands with your paths. Other measurements are on the pages of
the methods and on [Speed](speed.md), each with its command."""


def read(folder: Path) -> Kept:
    """Return the files of results/ by name."""
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }


def page(kept: Kept) -> str:
    """Return docs/results.md."""
    listed = [f"* [{_title(result)}](#{name})" for name, result in kept.items()]
    parts = [INTRODUCTION, "\n".join(listed), *(_section(*item) for item in kept.items())]
    return "\n\n".join(parts) + "\n"


def _section(name: str, result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    commit = "not recorded" if result["commit"] is None else f"`{result['commit'][:8]}`"
    facts = [
        f"* Data: {result['data']}",
        f"* Hardware: {result['hardware']}",
        f"* Seed: {result['seed']}; commit: {commit}; versions: {versions}",
        f"* File: `results/{name}.json`",
    ]
    columns = [*dict.fromkeys(key for line in result["figures"] for key in line)]
    columns = [
        key for key in columns if any(line.get(key) is not None for line in result["figures"])
    ]
    lines = [[cell(line.get(key)) for key in columns] for line in result["figures"]]
    parts = [
        f'<a id="{name}"></a>\n\n## {_title(result)}',
        table([[heading(key) for key in columns], *lines]),
        f"```\n{result['command']}\n```",
        "\n".join(facts),
    ]
    return "\n\n".join([*parts, *([result["note"]] if result.get("note") else [])])


def _title(result: Mapping[str, Any]) -> str:
    title = str(result["title"])
    return title[:1].upper() + title[1:]


def heading(key: str) -> str:
    """Return a key of results/ as a heading.

    >>> heading("kept_macs_percent"), heading("top1_at_90")
    ('kept MACs, %', 'top-1 at 90')
    """
    words = [_WORDS.get(word, word) for word in key.split("_")]
    text = " ".join(words)
    return text.removesuffix(" percent") + ", %" if text.endswith(" percent") else text


def cell(value: object) -> str:
    """Return a number or text as a table shows it; a dash: not measured.

    >>> cell(86567656), cell(82.0), cell(None)
    ('86,567,656', '82.0', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    text = str(value)
    return text if not isinstance(value, str) or "=" not in text else f"`{text}`"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first line is its head."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
