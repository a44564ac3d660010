"""A report as a run of W&B: the rows, their curves and the figure."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vitrim import files
from vitrim.report import compare
from vitrim.report.figure import ACCURACY, Panel, labelled, line_of
from vitrim.report.summary import NAMES, Row, Spread


def log_wandb(rows: Sequence[Row], png: Path, *, mode: Literal["offline", "online"]) -> None:
    """Log the rows, their curves and the figure as one W&B run; a failure is only a warning."""
    try:
        import wandb

        files.own_folder(png.parents[1] / "wandb")
        with wandb.init(
            project="vitrim",
            job_type="report",
            dir=png.parents[1],
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True, quiet=True, console="off"),
        ) as run:
            head, *cells = numbers(rows)
            run.log({"rows": wandb.Table([*map(str, head)], cells), "curve": wandb.Image(str(png))})
            lines = compare.comparison(rows)
            if lines:
                run.log({"published": wandb.Table([*compare.HEAD], lines)})
            panel = Panel("strength", "strength", *ACCURACY)
            parts = {label: line_of(part, panel, panel.y) for label, part in labelled(rows).items()}
            curves = {label: points for label, points in parts.items() if points}
            if curves:
                xs, ys = [line.x for line in curves.values()], [line.y for line in curves.values()]
                names, title = list(curves), "top-1 accuracy (%) by strength"
                plot = wandb.plot.line_series(xs, ys, names, title=title, xname="strength")
                run.log({"strength_top1": plot})
    except Exception as error:  # the report is on disk by now, and tracking must not spoil it
        logging.getLogger(__name__).warning("W&B: %s", error)


def numbers(rows: Sequence[Row]) -> list[list[object]]:
    """Return the headings and then the values of each row, in full precision."""
    texts = ("series", *NAMES, "target.metric", "target.keep")
    measures = tuple(dict.fromkeys(measure for row in rows for measure in row.spreads))
    finals = [row.spreads["compact.top1"] or Spread(math.nan, None, 0) for row in rows]
    values = [
        [*(row.record[key] for key in texts), *map(row.mean, measures), final.std, final.n]
        for row, final in zip(rows, finals, strict=True)
    ]
    return [[*texts, *measures, "compact.top1.std", "n"], *values]
