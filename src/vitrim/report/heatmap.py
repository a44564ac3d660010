"""What a plan leaves in every block of its network: kept units by site, ranks by layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from vitrim.network import structure
from vitrim.network.skeleton import dense_skeleton
from vitrim.network.structure import Structure, names_in, runs_of
from vitrim.network.survivors import dropped_of, ranks_of, resolve
from vitrim.plan import Plan

_PLACE = re.compile(r"(.*\.\d+)\.(.+)")


class Left(NamedTuple):
    """How many units of a site, or which rank of a layer, are left, `of` how many there were."""

    kept: int
    of: int


class Map(NamedTuple):
    """Blocks by module path, and by kind (of site or layer) what is left in each of them.

    None stands for a block that has nothing of that kind.
    """

    blocks: list[str]
    kinds: Mapping[str, list[Left | None]]


def left(plan: Plan) -> Map:
    """Return what `plan` leaves, by the kinds that it touches anywhere: none without edits.

    Raises:
        VitrimError: timm cannot build the network, it is of no known family, or the plan does not
            fit it.
    """
    described = _described(json.dumps(plan.model, sort_keys=True))
    blocks: dict[str, None] = {}
    kinds: dict[str, dict[str, Left]] = {}
    for name, cell in _cells(described, plan):
        place = _PLACE.fullmatch(name)
        block, kind = place.groups() if place else ("", name)
        blocks[block] = None
        kinds.setdefault(kind, {})[block] = cell
    touched = {
        kind: [cells.get(block) for block in blocks]
        for kind, cells in kinds.items()
        if any(cell.kept < cell.of for cell in cells.values())
    }
    return Map(list(blocks), touched)


@cache
def _described(model: str) -> Structure:
    """Return the structure of the network that a plan's `model`, as JSON, describes."""
    return structure(dense_skeleton(json.loads(model)))


def _cells(described: Structure, plan: Plan) -> Iterator[tuple[str, Left]]:
    """Iterate over the branches, and over the sites, layers and pieces of layers in those left."""
    survivors, ranks = resolve(described, plan), ranks_of(described, plan)
    dropped = dropped_of(described, plan)
    gone = names_in(described, dropped)
    for branch in described.branches:
        yield f"{branch.name} branch", Left(int(branch.name not in dropped), 1)
    for site in described.sites.values():
        if site.name not in gone:
            yield site.name, Left(len(survivors[site.name]), site.size)
    for layer in described.layers:
        columns = sum(part.size for part in layer.inp)
        for name, rows in runs_of(layer).items():
            if name not in gone:
                full = min(columns, sum(part.size for part in rows))
                yield f"{name} rank", Left(ranks.get(name, full), full)
