"""All figures of a report, by name; layouts say how wide they are and in which formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitrim.deploy.runfolder import Run
from vitrim.report import (
    block_figure,
    loss_figure,
    pareto,
    rank_figures,
    training_figure,
    trial_figure,
)
from vitrim.report.figure import draw
from vitrim.report.layout import SCREEN, Layout
from vitrim.report.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALTS = {
    "curve": "Accuracy by strength and by MACs",
    "losses": "Predicted and measured losses of single edits",
    "energy": "Energy kept by the share of the full rank",
    "ranks": "Accuracy by kept parameters",
    "error": "Output error by rank",
    "scores": "Scores of trials and the accuracy that each block costs",
    "training": "Losses of the trainings, by phase",
    "blocks": "MACs of every block, dense and compact",
}


def figures(
    runs: Sequence[Run], rows: Sequence[Row], layout: Layout = SCREEN, *, blocks: bool = False
) -> dict[str, Figure]:
    """Return the figures that these runs have the data for.

    `blocks` adds the MACs of every block, for which the networks are built without weights.
    """
    return {
        "curve": draw(rows, layout=layout),
        **pareto.figures(rows, layout),
        **loss_figure.figure(runs, layout),
        **rank_figures.figures(runs, rows, layout),
        **trial_figure.figure(runs, layout),
        **training_figure.figure(runs, layout),
        **(block_figure.figure(runs, layout) if blocks else {}),
    }


def captions(rows: Sequence[Row]) -> dict[str, str]:
    """Return what each figure shows, by name."""
    return {**ALTS, **pareto.captions(rows)}
