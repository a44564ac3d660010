"""Draw the MACs of every block before and after compression: blocks, a panel for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vitrim.deploy.runfolder import Document, Run, read_plan, read_recipe
from vitrim.errors import VitrimError
from vitrim.files import escape
from vitrim.report.figure import frame, line_look
from vitrim.report.layout import SCREEN, Layout, title_width, with_legend
from vitrim.report.summary import budget_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitrim.plan import Plan

MAX_PANELS = 12
_MAX_TICKS = 16
_DENSE = "0.82"


class Bars(NamedTuple):
    """The MACs of every block of one run, by the block's path: of the dense network, and kept."""

    title: str
    dense: Mapping[str, int]
    kept: Mapping[str, int]


def figure(runs: Sequence[Run], layout: Layout = SCREEN) -> dict[str, Figure]:
    """Return blocks, the MACs of the blocks of the first run of each row; empty without plans."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    charts = bars(runs)
    shown = charts[:MAX_PANELS]
    if not shown:
        return {}
    columns = min(layout.columns, len(shown))
    height = -(-len(shown) // columns)
    look = line_look(0)["color"]
    with style.context(["default", layout.style]):
        picture = Figure(figsize=(layout.width, 0.5 + 1.9 * height), layout="constrained")
        grid = [*picture.subplots(height, columns, squeeze=False).flat]
        for axes, chart in zip(grid, shown, strict=False):
            axes.set_title(escape.figure(chart.title, width=title_width(layout, columns)))
            _draw(axes, chart, look)
        for axes in grid[len(shown) :]:
            axes.remove()
        handles = [Patch(color=_DENSE, label="dense"), Patch(color=look, label="compact")]
        rest = len(charts) - len(shown)
        if rest:
            handles.append(Patch(alpha=0, label=f"{rest} more not drawn"))
        return {"blocks": with_legend(picture, handles, layout)}


def bars(runs: Sequence[Run]) -> list[Bars]:
    """Return the bars of the first run of each row: series, strength and target.

    Runs whose plan cannot be read or does not give the MACs of the report have none.
    """
    first: dict[tuple[str, str], Run] = {}
    for run in runs:
        first.setdefault((run.record["series"], budget_of(run.record)), run)
    return [found for run in first.values() if (found := _bars(run))]


def _bars(run: Run) -> Bars | None:
    try:
        plan = read_plan(run.folder)
        size = read_recipe(run.folder).get("model", {}).get("image_size")
        counted = None if plan is None else _counted(plan, size)
    except VitrimError:
        return None
    record = run.record
    if counted is None or counted[0] != record["dense.macs"] or not any(counted[1].values()):
        return None
    title = f"{record['label']}, {record['choices.model']}, {budget_of(record)}"
    return Bars(title, *counted[1:])


def _counted(plan: Plan, size: int | None) -> tuple[int, Mapping[str, int], Mapping[str, int]]:
    """Return the MACs of the dense network, and those of its blocks without and with the plan.

    Raises:
        VitrimError: the plan fits no network, or the network no images of this size.
    """
    from vitrim.budget.cost import shared_cost
    from vitrim.measure import image_shape
    from vitrim.network.skeleton import shared_skeleton
    from vitrim.plan import Plan

    net = shared_skeleton(plan.model)
    known: Document = net.pretrained_cfg  # type: ignore[assignment]
    sides = size or plan.model["args"].get("img_size") or known["input_size"][1:]
    shape = image_shape(net, sides)
    cost = shared_cost(net, tuple(shape))
    nothing = Plan(model=plan.model, edits=())
    return cost.dense_count.macs, cost.macs_of_blocks(nothing), cost.macs_of_blocks(plan)


def _draw(axes: Axes, chart: Bars, look: str) -> None:
    places = range(len(chart.dense))
    size, unit = (1e9, "G") if max(chart.dense.values()) >= 1e9 else (1e6, "M")
    frame(axes, "block", f"MACs ({unit})")
    for values, colour in ((chart.dense, _DENSE), (chart.kept, look)):
        axes.bar(places, [value / size for value in values.values()], color=colour, width=0.8)
    step = -(-len(places) // _MAX_TICKS)
    axes.set_xticks(places[::step], [block_numbers(block) for block in chart.dense][::step])


def block_numbers(block: str) -> str:
    """Return the numbers in a block's path.

    >>> block_numbers("layers.0.blocks.11")
    '0.11'
    """
    return ".".join(part for part in block.split(".") if part.isdigit()) or escape.figure(block)
