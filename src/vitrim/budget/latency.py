"""Predict the latency of a cut network from measurements on this device.

The model: each branch saves time by its own widths alone, and the rest of the network takes as long
as before. What a width saves is measured in place: all branches of one shape are cut to it at once,
and runs of the cut network are interleaved with runs of the dense one. One minus the ratio of their
times, divided evenly among those branches, is a point of the table (at least what larger widths
save). By default MLPs have four widths below the dense one, attentions eight pairs of query-key and
value widths and two numbers of heads (`LatencyGrid`); between points the table is linear.

Sources of error: the noise of the points (a few percent on a busy machine), steps between the
points (widths that are not multiples of 8), and what neighbouring branches do to each other's
caches. Heads of unequal width run one after another, which the table does not cover: they are
refused.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import ge
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitrim.errors import VitrimError, is_positive, require
from vitrim.files import digest, write
from vitrim.jobs.lock import lock
from vitrim.measure import InputSize, in_precision, tf32, zeros_for
from vitrim.network import structure
from vitrim.network.head_runs import arrange_heads
from vitrim.network.structure import Attention, Site, Structure, of_kind
from vitrim.network.surgery import cut
from vitrim.network.survivors import Kept, resolve
from vitrim.network.timing import (
    Heads,
    chosen_heads,
    clock_of,
    forward_pass,
    interleaved_times,
)
from vitrim.plan import Keep, Plan

_FILE = "latency_table.json"
_MULTIPLE = 8  # measured widths of MLPs: others are slower than their size says

Fractions = Sequence[float]
"""Where a point of the table is: the fractions of units kept, one for each width that varies."""
Points = list[tuple[tuple[float, ...], tuple[Keep, ...]]]
"""The fractions kept at each point, and the edits that make it; none for the dense network."""


class LatencyError(VitrimError):
    """A network, or sites of it, whose latency cannot be predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyGrid:
    """The points of a table: the fractions of units kept, below 1.

    Args:
        mlp: hidden units of an MLP, rounded to multiples of 8.
        dims: query-key dims of a head, and value dims, in all pairs.
        heads: heads of an attention.
    """

    mlp: Fractions
    dims: Fractions
    heads: Fractions

    def __post_init__(self) -> None:
        require(
            "latency.table",
            self,
            *(
                (
                    name,
                    all(is_positive(fraction) and fraction < 1 for fraction in fractions),
                    "a list of fractions above 0 and below 1",
                )
                for name, fractions in asdict(self).items()
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyTable:
    """The latency of one dense network on one device, and what narrower branches save.

    `savings` maps a site to points: (fractions kept, fraction of the dense latency that one branch
    saves). Points of a query-key site are at (fraction of query-key dims, fraction of value dims).
    """

    dense_ms: float
    savings: Mapping[str, Sequence[tuple[Fractions, float]]]

    def ratio(self, described: Structure, survivors: Kept) -> float:
        """Return the latency of a cut network over that of the dense one."""
        saved = 0.0
        for site in of_kind(described, "hidden"):
            if site.name not in self.savings:
                continue  # it cannot be cut
            saved += self._interp1d(site.name, len(survivors[site.name]) / site.size)
        for attention in self._covered(described):
            heads = len(survivors[attention.heads]) / described.sites[attention.heads].size
            qk, v = (
                len(survivors[name]) / described.sites[name].size / heads
                for name in (attention.qk, attention.v)
            )
            of_dims = heads * self._interp2d(attention.qk, qk, v)
            saved += self._interp1d(attention.heads, heads) + of_dims
        return 1 - saved

    def predicted(self, described: Structure, plan: Plan) -> dict[str, float]:
        """Return the numbers of a report: the ratio predicted for `plan`, and the dense latency."""
        ratio = self.ratio(described, resolve(described, plan))
        return {"latency_ratio": ratio, "dense_ms": self.dense_ms}

    def check(self, described: Structure, scored: Sequence[str]) -> None:
        """Raise LatencyError if the time that cutting `scored` saves is not in the table."""
        known = {attention.v for attention in self._covered(described)} | self.savings.keys()
        unknown = [name for name in scored if name not in known]
        if unknown:
            raise LatencyError(
                f"target.latency: the time that cutting {unknown[0]} saves cannot be predicted: "
                "choose sites out of heads, qk, v and mlp of a transformer, or another target"
            )

    def _covered(self, described: Structure) -> list[Attention]:
        """Return the attentions in the table; those with a site that cannot be cut are not."""
        return [each for each in described.attentions if each.qk in self.savings]

    def _interp1d(self, name: str, fraction: float) -> float:
        points = sorted((fractions[0], saved) for fractions, saved in self.savings[name])
        return float(np.interp(fraction, [x for x, _ in points], [y for _, y in points]))

    def _interp2d(self, name: str, qk: float, v: float) -> float:
        """Return the savings at two fractions, interpolated bilinearly."""
        grid = {(fractions[0], fractions[1]): saved for fractions, saved in self.savings[name]}
        qk_points, v_points = (sorted({point[axis] for point in grid}) for axis in (0, 1))
        rows = [float(np.interp(v, v_points, [grid[x, y] for y in v_points])) for x in qk_points]
        return float(np.interp(qk, qk_points, rows))


def load_or_measure(
    shared: Path,
    net: nn.Module,
    model: Mapping[str, object],
    input_size: InputSize,
    *,
    grid: LatencyGrid,
    batch: int,
    repeats: int,
    device: str,
    heads: Heads = "runs",
    precision: str | None = None,
    graphs: bool = False,
) -> LatencyTable:
    """Return the table of the dense `net` that `model` describes, measured if it is not on disk.

    It is kept below `shared`, in a folder named after everything that it depends on: the network,
    the points, the batch, the device, the threads and how heads are run.
    """
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    machine = [device, gpu, platform.node(), torch.get_num_threads(), torch.__version__]
    if (heads, precision, graphs) != ("runs", None, False):
        machine += [heads, precision, graphs]
    if precision is None and gpu:
        machine.append(tf32())
    folder = shared / f"latency-{digest([model, input_size, asdict(grid), batch, machine])}"
    with lock(folder):
        path = folder / _FILE
        known = _known_table(path)
        if known is not None:
            return known
        table = measure_table(
            net,
            input_size,
            grid=grid,
            batch=batch,
            repeats=repeats,
            device=device,
            heads=heads,
            precision=precision,
            graphs=graphs,
        )
        text = json.dumps(asdict(table), indent=1)
        write(path, lambda file: file.write_text(text))
        return LatencyTable(**json.loads(text))


def _known_table(path: Path) -> LatencyTable | None:
    """Return the table in a file, or None where there is none, or something else."""
    try:
        return LatencyTable(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def measure_table(
    net: nn.Module,
    input_size: InputSize,
    *,
    grid: LatencyGrid,
    batch: int,
    repeats: int,
    device: str,
    heads: Heads = "runs",
    precision: str | None = None,
    graphs: bool = False,
) -> LatencyTable:
    """Measure the table of a dense network; its weights do not matter.

    The settings are those of `vitrim.measure.latencies`.

    Raises:
        LatencyError: a network without attentions, or MLPs, that can be cut.
    """
    shapes = [*_shapes(structure(net), grid)]
    if not shapes:
        raise LatencyError(
            f"target.latency: nothing in {type(net).__name__} has a width whose latency can be "
            "predicted (convolutional networks have none): choose target.macs"
        )
    dense = in_precision(copy.deepcopy(net), device, precision).eval()
    x = zeros_for(dense, batch, input_size)
    savings: dict[str, list[tuple[Fractions, float]]] = {}
    dense_times: list[float] = []
    for names, points in shapes:
        for fractions, keeps in points:
            saved = 0.0
            if keeps:
                smaller = cut(dense, Plan(model={}, edits=keeps)).eval()
                arrange_heads(smaller, chosen_heads(smaller, x, heads))
                times = _interleaved([dense, smaller], x, repeats, graphs=graphs)
                dense_times += times[0]
                saved = 1 - statistics.median(b / a for a, b in zip(*times, strict=True))
            for name in names:
                savings.setdefault(name, []).append((fractions, max(0.0, saved) / len(names)))
    return LatencyTable(
        dense_ms=statistics.median(dense_times),
        savings={name: monotone(points) for name, points in savings.items()},
    )


def monotone(points: Sequence[tuple[Fractions, float]]) -> list[tuple[Fractions, float]]:
    """Return the points with at least the savings of every wider one, which is noise otherwise.

    >>> monotone([((0.25,), 0.1), ((0.5,), 0.2), ((1.0,), 0.0)])
    [((0.25,), 0.2), ((0.5,), 0.2), ((1.0,), 0.0)]
    """
    return [
        (
            fractions,
            max(saved for wider, saved in points if all(map(ge, wider, fractions))),
        )
        for fractions, _ in points
    ]


def _interleaved(
    nets: Sequence[nn.Module], x: Tensor, repeats: int, *, graphs: bool
) -> list[list[float]]:
    """Return milliseconds of every network's forward passes, whose runs are interleaved."""
    with torch.inference_mode():
        passes = [forward_pass(net, x, graphs=graphs) for net in nets]
        return interleaved_times(passes, repeats, clock=clock_of(x.device))


def _shapes(described: Structure, grid: LatencyGrid) -> Iterator[tuple[list[str], Points]]:
    """Iterate over shapes: the sites that share a table, and what to cut for each of its points."""
    sites = described.sites
    mlps: dict[int, list[str]] = {}
    for site in of_kind(described, "hidden"):
        if not site.locked_reason:
            mlps.setdefault(site.size, []).append(site.name)
    for size, names in mlps.items():
        yield names, [*_hidden(size, names, grid.mlp)]
    attentions: dict[tuple[int, ...], list[Attention]] = {}
    for attention in described.attentions:
        own = [sites[name] for name in (attention.heads, attention.qk, attention.v)]
        if not any(site.locked_reason for site in own):
            attentions.setdefault(tuple(site.size for site in own), []).append(attention)
    for (n_heads, *_), alike in attentions.items():
        names = [attention.heads for attention in alike]
        yield names, [*_heads(n_heads, names, grid.heads)]
        yield [attention.qk for attention in alike], [*_dims(sites, alike, grid.dims)]


def _hidden(
    size: int, names: Sequence[str], fractions: Fractions
) -> Iterator[tuple[tuple[float], tuple[Keep, ...]]]:
    widths = {max(_MULTIPLE, round(size * f / _MULTIPLE) * _MULTIPLE) for f in fractions}
    for width in sorted(widths & {*range(size)}):
        yield (width / size,), tuple(Keep(site=name, index=tuple(range(width))) for name in names)
    yield (1.0,), ()


def _heads(
    size: int, names: Sequence[str], fractions: Fractions
) -> Iterator[tuple[tuple[float], tuple[Keep, ...]]]:
    for n in sorted({max(1, round(size * f)) for f in fractions} & {*range(size)}):
        yield (n / size,), tuple(Keep(site=name, index=tuple(range(n))) for name in names)
    yield (1.0,), ()


def _dims(
    sites: Mapping[str, Site], alike: Sequence[Attention], fractions: Fractions
) -> Iterator[tuple[tuple[float, float], tuple[Keep, ...]]]:
    for qk in (*fractions, 1.0):
        for v in (*fractions, 1.0):
            yield (
                (qk, v),
                tuple(
                    Keep(site=name, index=_first(sites[name], fraction))
                    for attention in alike
                    for fraction, name in ((qk, attention.qk), (v, attention.v))
                    if fraction < 1
                ),
            )


def _first(site: Site, fraction: float) -> tuple[int, ...]:
    """Return the first dims of every head, a fraction of each."""
    starts = np.cumsum([0, *site.head_dims])
    return tuple(
        int(start) + unit
        for start, dim in zip(starts, site.head_dims, strict=False)
        for unit in range(max(1, round(fraction * dim)))
    )
