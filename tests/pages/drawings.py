"""The two drawings of the documents, as SVG: the trade-off of our results, and the pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from .measured import Kept

INK, GREY, PAPER, LIGHT = "#1b1f24", "#5b6570", "#ffffff", "#e3e7eb"
FONT = "font-family='Helvetica, Arial, sans-serif'"


class Curve(NamedTuple):
    """A line of the trade-off: points are (kept MACs, top-1), both in percent."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


def curves(kept: Kept) -> list[Curve]:
    """Return ViT-Ti's curves: up to 1000 unlabelled images, 650 for evaluation."""
    joint = kept["joint_vit_tiny"]["figures"][1:]
    mlp = kept["oneshot_vit_tiny"]["figures"][1:]
    ranks = {line["variant"]: line for line in kept["mixed_rank_vit_tiny"]["figures"]}
    macs, top1 = ranks["kept MACs, percent"], ranks["with sequential regression (default)"]
    few = kept["dcvit_vit_tiny_1000"]["figures"]
    shares = [f"top1_at_{share}" for share in (90, 80, 70, 60, 50)]
    return [
        Curve("joint", "#0b6e99", [(r["kept_macs_percent"], r["top1"]) for r in joint]),
        Curve("oneshot, MLP units", "#c4532b", [(r["kept_macs_percent"], r["top1"]) for r in mlp]),
        Curve(
            "dcvit, mimicking", "#3d8b40", [(r["kept_macs_percent"], r["top1_dcvit"]) for r in few]
        ),
        Curve("mixed_rank", "#7a5299", [(macs[share], top1[share]) for share in shares]),
    ]


def tradeoff(kept: Kept) -> str:
    """Return docs/tradeoff.svg."""
    dense = kept["joint_vit_tiny"]["figures"][0]["top1"]
    left, right, top, bottom = 64.0, 700.0, 56.0, 348.0

    def x(macs: float) -> float:
        return left + (macs - 45) / 57 * (right - left)

    def y(top1: float) -> float:
        return bottom - top1 / 90 * (bottom - top)

    parts = [
        _text(left, 26, "ViT-Ti on ImageNet: accuracy against compute", size=17, weight="bold")
    ]
    parts.append(
        _text(
            left,
            45,
            "1000 unlabelled images, 650 for evaluation; nothing trained end to end but dcvit",
            size=12,
            fill=GREY,
        )
    )
    for value in (0, 20, 40, 60, 80):
        parts.append(_line(left, y(value), right, y(value), LIGHT))
        parts.append(_text(left - 8, y(value) + 4, f"{value}", anchor="end", fill=GREY))
    for value in (50, 60, 70, 80, 90, 100):
        parts.append(_text(x(value), bottom + 20, f"{value} %", anchor="middle", fill=GREY))
    parts.append(_line(left, y(dense), right, y(dense), GREY, dash="5 4"))
    parts.append(_text(left + 4, y(dense) - 6, f"dense: {dense}", fill=GREY))
    parts.append(_text((left + right) / 2, bottom + 42, "MACs that remain", anchor="middle"))
    parts.append(_text(18, (top + bottom) / 2, "top-1, %", anchor="middle", rotate=True))
    for number, curve in enumerate(curves(kept)):
        ordered = sorted(curve.points)
        path = " ".join(f"{x(macs):.1f},{y(top1):.1f}" for macs, top1 in ordered)
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{curve.colour}' stroke-width='2.5'/>"
        )
        for macs, top1 in ordered:
            title = f"<title>{curve.name}: {macs} % of the MACs, top-1 {top1}</title>"
            parts.append(
                f"<circle cx='{x(macs):.1f}' cy='{y(top1):.1f}' r='4.5' fill='{curve.colour}'>"
                f"{title}</circle>"
            )
        row = bottom - 92 + 22 * number
        parts.append(_line(right - 190, row, right - 164, row, curve.colour, width=2.5))
        parts.append(_text(right - 156, row + 4, curve.name))
    label = "Top-1 of ViT-Ti against the MACs that remain, for four methods"
    return _svg(720, 402, label, parts)


STEPS = (
    ("score", "a scorer looks at images", "evidence"),
    ("plan", "edits within the target", "plan.json"),
    ("cut", "layers are sliced", "compact network"),
    ("recover", "closed form or training", "report.json"),
)


def pipeline() -> str:
    """Return docs/pipeline.svg."""
    return _svg(
        820, 176, "Score, plan, cut, recover: from a dense to a compact network", [*_steps()]
    )


def _steps() -> Iterator[str]:
    yield (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' "
        f"markerHeight='8' orient='auto'><path d='M0 0 L8 4 L0 8 Z' fill='{GREY}'/></marker></defs>"
    )
    heights = (76, 76, 76, 46, 46)
    for number, height in enumerate(heights):
        left, wide = 26 + 164 * number, (50 if number < 3 else 36)
        for bar in range(4):
            tall = height if number < 3 else height * (1.0, 0.6, 0.8, 0.5)[bar]
            colour = "#0b6e99" if number < 4 else "#3d8b40"
            x, y = left + bar * wide / 3.6, 84 - tall / 2
            yield (
                f"<rect x='{x:.1f}' y='{y:.1f}' width='{wide / 5:.1f}' height='{tall:.1f}' rx='2' "
                f"fill='{colour}' opacity='{1 if number in (0, 3, 4) else 0.45}'/>"
            )
    for number, (name, does, gives) in enumerate(STEPS):
        start = 26 + 164 * number + 58
        end = start + 96
        yield (
            f"<line x1='{start}' y1='84' x2='{end}' y2='84' stroke='{GREY}' stroke-width='2' "
            "marker-end='url(#tip)'/>"
        )
        middle = (start + end) / 2
        yield _text(middle, 74, name, anchor="middle", size=15, weight="bold")
        yield _text(middle, 142, does, anchor="middle", size=11, fill=GREY)
        yield _text(middle, 160, gives, anchor="middle", size=12)
    yield _text(50, 22, "dense", anchor="middle", size=13)
    yield _text(26 + 164 * 4 + 20, 22, "compact", anchor="middle", size=13)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    anchor: str = "start",
    fill: str = INK,
    weight: str = "normal",
    rotate: bool = False,
) -> str:
    turn = f" transform='rotate(-90 {x:.1f} {y:.1f})'" if rotate else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='{fill}'{turn}>{escape(text)}</text>"
    )


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1, dash: str = ""
) -> str:
    dashed = f" stroke-dasharray='{dash}'" if dash else ""
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}' "
        f"stroke-width='{width}'{dashed}/>"
    )


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    lines = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}' role='img' aria-label='{escape(label)}'>\n"
        f"<rect width='{width}' height='{height}' fill='{PAPER}'/>\n{lines}\n</svg>\n"
    )
