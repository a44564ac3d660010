"""How long a cut network will take, foretold from measurements on this device.

The model: each branch saves time by its own widths alone, and the rest of the network takes what it
took. What a width saves is measured in place: all branches of one shape are cut to it at once, and
the network takes turns with the dense one; the ratio of their times, spread over those branches, is
a point of the table (at least what the wider ones save). MLPs have four widths below the dense one,
attentions eight pairs of query-key and value widths and two numbers of heads; between points the
table is linear.

Its error: the points' own noise (a few percent on a busy machine), steps between the points (widths
that are no multiple of 8), what neighbouring branches do to each other's caches, and heads of
unequal width, which run one after another: those are refused.
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
from typing import Any

import numpy as np
import torch
from torch import nn

from vitrim.errors import VitrimError
from vitrim.files import write
from vitrim.measure import InputSize, image_shape, in_turns
from vitrim.network import structure
from vitrim.network.structure import Attention, Site, Structure
from vitrim.network.surgery import cut
from vitrim.network.survivors import Survivors, resolve
from vitrim.plan import Keep, Plan

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of an MLP
DIMS = (1 / 4, 1 / 2)  # of a head
HEADS = (1 / 3, 2 / 3)


class TimingError(VitrimError):
    """A network, or sites of it, whose time cannot be foretold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The dense time and the table of one network on one device.

    `saved` maps a site to points (shares kept, share of the dense time that one branch saves); of a
    query-key site the points are (share of query-key dims, share of value dims).
    """

    dense_ms: float
    saved: Mapping[str, Sequence[tuple[Sequence[float], float]]]

    def ratio(self, described: Structure, survivors: Survivors) -> float:
        """Return the time of a cut network over that of the dense one."""
        gone = 0.0
        for name, site in described.sites.items():
            if name.endswith(".hidden"):
                gone += self._along(name, len(survivors[name]) / site.size)
        for attention in described.attentions:
            heads, whole = len(survivors[attention.heads]), described.sites[attention.heads].size
            left = heads / whole
            q, v = (
                len(survivors[name]) / described.sites[name].size / left
                for name in (attention.qk, attention.v)
            )
            gone += self._along(attention.heads, left) + left * self._between(attention.qk, q, v)
        return 1 - gone

    def foretold(self, described: Structure, plan: Plan) -> dict[str, float]:
        """Return what a report says: the ratio foretold for `plan`, and the dense time in ms."""
        ratio = self.ratio(described, resolve(described, plan))
        return {"latency_ratio": ratio, "dense_ms": self.dense_ms}

    def check(self, described: Structure, scored: Sequence[str]) -> None:
        """Raise TimingError if the time that cutting `scored` saves is not in the table."""
        known = {attention.v for attention in described.attentions} | self.saved.keys()
        unknown = [name for name in scored if name not in known]
        if unknown:
            raise TimingError(
                f"target.latency: how much time cutting {unknown[0]} saves is not foretold: "
                "choose sites out of heads, qk, v and mlp of a transformer, or another target"
            )

    def _along(self, name: str, share: float) -> float:
        points = sorted((at[0], gone) for at, gone in self.saved[name])
        return float(np.interp(share, [x for x, _ in points], [y for _, y in points]))

    def _between(self, name: str, q: float, v: float) -> float:
        """Return what the table has at query-key share `q` and value share `v`, bilinearly."""
        grid = {(at[0], at[1]): gone for at, gone in self.saved[name]}
        qs, vs = (sorted({at[i] for at in grid}) for i in (0, 1))
        rows = [float(np.interp(v, vs, [grid[x, y] for y in vs])) for x in qs]
        return float(np.interp(q, qs, rows))


def once(
    shared: Path,
    net: nn.Module,
    model: Mapping[str, Any],
    input_size: InputSize,
    *,
    batch: int,
    repeats: int,
    device: str,
) -> Timing:
    """Return the table of the dense `net` that `model` describes, measured if it is not there.

    It is kept below `shared`, by all that it hangs on: the network, batch, device and threads.
    """
    from vitrim.files import digest
    from vitrim.jobs.lock import lock

    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    where = [device, gpu, platform.node(), torch.get_num_threads(), torch.__version__]
    folder = shared / f"latency-{digest([model, input_size, batch, where])}"
    with lock(folder):
        path = folder / "timing.json"
        if not path.is_file():
            found = timed(net, input_size, batch=batch, repeats=repeats, device=device)
            text = json.dumps(asdict(found), indent=1)
            write(path, lambda file: file.write_text(text))
        return Timing(**json.loads(path.read_text()))


def timed(
    net: nn.Module, input_size: InputSize, *, batch: int, repeats: int, device: str
) -> Timing:
    """Measure the table of a dense network; its weights do not matter.

    Raises:
        TimingError: a network without attentions, or MLPs, that can be cut.
    """
    described = structure(net)
    shapes = [*_shapes(described)]
    if not shapes:
        raise TimingError(
            f"target.latency: nothing in {type(net).__name__} has a width whose time can be "
            "foretold (of convolutional networks, none): choose target.macs"
        )
    whole = copy.deepcopy(net).to(device).eval()
    x = torch.zeros(batch, *image_shape(net, input_size), device=device)
    saved: dict[str, list[tuple[Sequence[float], float]]] = {}
    dense: list[float] = []
    for names, kept in shapes:
        for at, keeps in kept:
            gone = 0.0
            if keeps:
                smaller = cut(net, Plan(model={}, edits=keeps)).to(device).eval()
                times = _by_turns([whole, smaller], x, repeats)
                dense += times[0]
                gone = 1 - statistics.median(b / a for a, b in zip(*times, strict=True))
            for name in names:
                saved.setdefault(name, []).append((at, max(0.0, gone) / len(names)))
    return Timing(
        dense_ms=statistics.median(dense),
        saved={name: monotone(points) for name, points in saved.items()},
    )


def monotone(
    points: Sequence[tuple[Sequence[float], float]],
) -> list[tuple[Sequence[float], float]]:
    """Return the points with at least the savings of every wider one: the rest is noise.

    >>> monotone([((0.25,), 0.1), ((0.5,), 0.2), ((1.0,), 0.0)])
    [((0.25,), 0.2), ((0.5,), 0.2), ((1.0,), 0.0)]
    """
    return [
        (at, max(gone for wider, gone in points if all(map(ge, wider, at)))) for at, _ in points
    ]


def _by_turns(nets: Sequence[nn.Module], x: torch.Tensor, repeats: int) -> list[list[float]]:
    def call(net: nn.Module) -> Any:
        def run() -> None:
            net(x)
            if x.is_cuda:
                torch.cuda.synchronize()

        return run

    with torch.inference_mode():
        return in_turns([call(net) for net in nets], repeats)


Points = list[tuple[tuple[float, ...], tuple[Keep, ...]]]


def _shapes(described: Structure) -> Iterator[tuple[list[str], Points]]:
    """Iterate over shapes: the sites that their table is for, and what to cut for every point."""
    sites = described.sites
    widths: dict[int, list[str]] = {}
    for site in sites.values():
        if site.name.endswith(".hidden") and not site.locked:
            widths.setdefault(site.size, []).append(site.name)
    for size, names in widths.items():
        yield names, [(at, keeps) for at, keeps in _hidden(size, names)]
    shapes: dict[tuple[int, ...], list[Attention]] = {}
    for attention in described.attentions:
        if not any(sites[name].locked for name in (attention.heads, attention.qk, attention.v)):
            key = (sites[attention.heads].size, sites[attention.qk].size, sites[attention.v].size)
            shapes.setdefault(key, []).append(attention)
    for same in shapes.values():
        first = same[0]
        yield (
            [attention.heads for attention in same],
            [*_heads(sites[first.heads].size, [attention.heads for attention in same])],
        )
        yield [attention.qk for attention in same], [*_dims(sites, same)]


def _hidden(size: int, names: Sequence[str]) -> Iterator[tuple[tuple[float], tuple[Keep, ...]]]:
    for width in sorted({max(8, round(size * share / 8) * 8) for share in WIDTHS} & {*range(size)}):
        yield (width / size,), tuple(Keep(site=name, index=tuple(range(width))) for name in names)
    yield (1.0,), ()


def _heads(size: int, names: Sequence[str]) -> Iterator[tuple[tuple[float], tuple[Keep, ...]]]:
    for n in sorted({max(1, round(size * share)) for share in HEADS} & {*range(size)}):
        yield (n / size,), tuple(Keep(site=name, index=tuple(range(n))) for name in names)
    yield (1.0,), ()


def _dims(
    sites: Mapping[str, Site], same: Sequence[Attention]
) -> Iterator[tuple[tuple[float, float], tuple[Keep, ...]]]:
    for q in (*DIMS, 1.0):
        for v in (*DIMS, 1.0):
            shares = ((q, "qk"), (v, "v"))
            yield (
                (q, v),
                tuple(
                    Keep(site=site.name, index=_first(site, share))
                    for attention in same
                    for share, kind in shares
                    if share < 1
                    for site in [sites[getattr(attention, kind)]]
                ),
            )


def _first(site: Site, share: float) -> tuple[int, ...]:
    """Return the first dims of every head, a share of each."""
    starts = np.cumsum([0, *site.head_dims])
    return tuple(
        int(start) + unit
        for start, dim in zip(starts, site.head_dims, strict=False)
        for unit in range(max(1, round(share * dim)))
    )
