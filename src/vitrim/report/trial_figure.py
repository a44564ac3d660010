"""How well the trials of dense compression predict what a block costs: figure 4 of DC-ViT.

The data are runs that each compressed one block (`method.allowed_blocks=[blocks.3]`), or one group
of blocks, which has the name of its first: its score in the trials against the loss of top-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vitrim.deploy.runfolder import Run, RunFolderError, read_diagnostic
from vitrim.files import escape
from vitrim.report.layout import SCREEN, Layout, with_legend
from vitrim.report.summary import target_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST = 1e12
"""Of a trial's score."""


class TrialCorrelation(NamedTuple):
    """Blocks compressed one by one in runs with the same trials, and the rank correlation."""

    label: str
    blocks: list[str]
    scores: list[float]
    lost: list[float]
    correlation: float


class _Point(NamedTuple):
    """The score of a block in the trials, and the top-1 that compressing it cost."""

    score: float
    lost: float


def rank_correlations(runs: Sequence[Run]) -> list[TrialCorrelation]:
    """Return the rank correlation of every group of runs that have the same trials.

    Groups of fewer than three blocks, or of equal scores or losses, have none.

    Raises:
        RunFolderError: trials that no run of vitrim wrote.
    """
    groups: dict[tuple[str, tuple[tuple[str, float], ...]], dict[str, _Point]] = {}
    for run in runs:
        trials, compressed = trials_of(run)
        dense, final = run.record.get("dense.top1"), run.record.get("compact.top1")
        tried = [block for block in compressed if block in trials]
        if len(tried) != 1 or dense is None or final is None:
            continue
        record = run.record
        label = f"{record['choices.model']}, {target_of(record)}, seed {record['seed']}"
        group = groups.setdefault((label, tuple(sorted(trials.items()))), {})
        group[tried[0]] = _Point(trials[tried[0]], dense - final)
    return [
        _correlation(label, points) for (label, _), points in groups.items() if _can_rank(points)
    ]


def _can_rank(points: dict[str, _Point]) -> bool:
    scores, lost = ({point[i] for point in points.values()} for i in (0, 1))
    return len(points) > 2 and len(scores) > 1 and len(lost) > 1


def _correlation(label: str, points: dict[str, _Point]) -> TrialCorrelation:
    from scipy.stats import spearmanr

    scores, lost = zip(*points.values(), strict=True)
    blocks = sorted(points)
    return TrialCorrelation(
        label,
        blocks,
        [points[block].score for block in blocks],
        [points[block].lost for block in blocks],
        float(spearmanr(scores, lost)[0]),
    )


def trials_of(run: Run) -> tuple[dict[str, float], list[str]]:
    """Return the trials' scores by block and the compressed blocks; empty where there are none.

    A plan of several methods has none: its loss is not that of one block.

    Raises:
        RunFolderError: naming the file and what is wrong with it.
    """
    diagnostic = read_diagnostic(run.folder, "trials")
    if diagnostic is None or diagnostic.is_composed:
        return {}, []
    trials, blocks = diagnostic.value, diagnostic.notes.get("blocks")
    if not isinstance(trials, dict) or not isinstance(blocks, list):
        return {}, []
    if not all(type(n) in (int, float) and abs(n) <= _LARGEST for n in trials.values()):
        raise RunFolderError(f"{diagnostic.where}: expected a number by block")
    return trials, [block for block in blocks if isinstance(block, str)]


def lines(runs: Sequence[Run]) -> list[str]:
    """Return a sentence on each group of runs."""
    return [
        f"rank correlation of trial scores and lost top-1: {group.correlation:.2f} over "
        f"{len(group.blocks)} blocks ({group.label})"
        for group in rank_correlations(runs)
    ]


def figure(runs: Sequence[Run], layout: Layout = SCREEN) -> dict[str, Figure]:
    """Return scores, the score of every block against its loss; empty without such runs."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from vitrim.report.figure import frame, line_look

    groups = rank_correlations(runs)
    if not groups:
        return {}
    with style.context(["default", layout.style]):
        picture = Figure(figsize=(min(5.0, layout.width), 3.6), layout="constrained")
        axes = picture.subplots()
        frame(axes, "score of the trial", "top-1 accuracy lost (points)")
        handles = []
        for index, group in enumerate(groups):
            look = line_look(index) | {"linestyle": ""}
            axes.plot(group.scores, group.lost, **look)
            for block, x, y in zip(group.blocks, group.scores, group.lost, strict=True):
                number = escape.figure(block.rpartition(".")[2])
                axes.annotate(number, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
            label = escape.figure(f"{group.label}: rank correlation {group.correlation:.2f}")
            handles.append(Line2D([], [], label=label, **look))
        return {"scores": with_legend(picture, handles, layout)}
