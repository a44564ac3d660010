"""How well trials of dense compression foresee what a block costs: DC-ViT's figure 4.

From runs that each compressed one block (`method.only=[blocks.3]`), or one group of blocks, which
goes by the name of its first: its score in the trials against the top-1 that the network lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from vitrim.errors import ReportError
from vitrim.report.rank_figures import provenance_of
from vitrim.report.summary import Run


class Foreseen(NamedTuple):
    """Blocks compressed one by one in runs that share their trials, and the rank correlation."""

    label: str
    blocks: list[str]
    scores: list[float]
    lost: list[float]
    correlation: float


def foreseen(runs: Sequence[Run]) -> list[Foreseen]:
    """Return what runs with one compressed block say, by the trials that they share.

    Raises:
        ReportError: a plan that cannot be read.
    """
    groups: dict[tuple[Any, ...], dict[str, tuple[float, float]]] = {}
    for run in runs:
        trials, blocks = trials_of(run)
        dense, final = run.record.get("dense.top1"), run.record.get("compact.top1")
        tried = [block for block in blocks if block in trials]
        if len(tried) != 1 or dense is None or final is None:
            continue
        aim = f"{run.record['target.metric']}={run.record['target.keep']}"
        label = f"{run.record['choices.model']}, {aim}, seed {run.record['seed']}"
        group = groups.setdefault((label, tuple(sorted(trials.items()))), {})
        group[tried[0]] = (trials[tried[0]], dense - final)
    return [
        Foreseen(
            label,
            sorted(found),
            [found[block][0] for block in sorted(found)],
            [found[block][1] for block in sorted(found)],
            float(spearmanr([x for x, _ in found.values()], [y for _, y in found.values()])[0]),
        )
        for (label, _), found in groups.items()
        if len(found) > 2 and all(len({pair[i] for pair in found.values()}) > 1 for i in (0, 1))
    ]


def trials_of(run: Run) -> tuple[dict[str, float], list[str]]:
    """Return scores by block and the compressed blocks, as a plan has them; or nothing.

    Raises:
        ReportError: naming the file and what is wrong with it.
    """
    path, provenance = run.folder / "plan.json", provenance_of(run, "trials")
    trials, blocks = provenance.get("trials"), provenance.get("blocks")
    if not isinstance(trials, dict) or not isinstance(blocks, list):
        return {}, []
    if not all(type(score) in (int, float) for score in trials.values()):
        raise ReportError(f"{path}: provenance.trials: expected a number by block")
    return trials, [block for block in blocks if isinstance(block, str)]


def lines(runs: Sequence[Run]) -> list[str]:
    """Return a sentence on each group of runs."""
    return [
        f"rank correlation of trial scores and lost top-1: {group.correlation:.2f} over "
        f"{len(group.blocks)} blocks ({group.label})"
        for group in foreseen(runs)
    ]


def figure(runs: Sequence[Run]) -> dict[str, bytes]:
    """Return scores.png, the score of every block against what it cost; or nothing."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from vitrim.report.figure import STYLE, frame, line_look, png

    groups = foreseen(runs)
    if not groups:
        return {}
    with style.context(["default", STYLE]):
        picture = Figure(figsize=(5.0, 3.6), layout="constrained")
        axes = picture.subplots()
        frame(axes, "score of the trial", "top-1 accuracy lost (points)")
        handles = []
        for at, group in enumerate(groups):
            look = line_look(at) | {"linestyle": ""}
            axes.plot(group.scores, group.lost, **look)
            for block, x, y in zip(group.blocks, group.scores, group.lost, strict=True):
                number = block.rpartition(".")[2]
                axes.annotate(number, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
            label = f"{group.label}: rank correlation {group.correlation:.2f}"
            handles.append(Line2D([], [], label=label, **look))
        return {"scores.png": png(picture, handles)}
