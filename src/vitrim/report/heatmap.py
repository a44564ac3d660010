"""What a plan keeps in every block of its network: units by site, ranks by layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from vitrim.plan import Plan

if TYPE_CHECKING:
    from vitrim.network.structure import Structure

_IN_BLOCK = re.compile(r"(.*\.\d+)\.(.+)")


class Cell(NamedTuple):
    """How many of `total` units of a site are kept, or which rank of a layer of its full one."""

    kept: int
    total: int


class Heatmap(NamedTuple):
    """Blocks by module path, and by kind (of site or layer) what is kept in each of them.

    None means a block that has nothing of that kind.
    """

    blocks: list[str]
    kinds: Mapping[str, list[Cell | None]]


def heatmap(plan: Plan) -> Heatmap:
    """Return what `plan` keeps, by the kinds that it edits anywhere: none without edits.

    Raises:
        VitrimError: timm cannot build the network, it is of no known family, or the plan does not
            fit it.
    """
    described = _described(json.dumps(plan.model, sort_keys=True))
    blocks: dict[str, None] = {}
    kinds: dict[str, dict[str, Cell]] = {}
    for name, cell in _cells(described, plan):
        match = _IN_BLOCK.fullmatch(name)
        block, kind = match.groups() if match else ("", name)
        blocks[block] = None
        kinds.setdefault(kind, {})[block] = cell
    edited = {
        kind: [cells.get(block) for block in blocks]
        for kind, cells in kinds.items()
        if any(cell.kept < cell.total for cell in cells.values())
    }
    return Heatmap(list(blocks), edited)


@cache
def _described(model: str) -> Structure:
    """Return the structure of the network that a plan's `model`, as JSON, describes."""
    from vitrim.network import structure
    from vitrim.network.skeleton import dense_skeleton

    return structure(dense_skeleton(json.loads(model)))


def _cells(described: Structure, plan: Plan) -> Iterator[tuple[str, Cell]]:
    """Iterate over the branches, and over sites, layers and parts of layers in the kept ones."""
    from vitrim.network.structure import factorisable_rows, members
    from vitrim.network.survivors import dropped_of, ranks_of, resolve

    kept_units, ranks = resolve(described, plan), ranks_of(described, plan)
    dropped = dropped_of(described, plan)
    removed = members(described, dropped)
    for branch in described.branches:
        yield f"{branch.name} branch", Cell(int(branch.name not in dropped), 1)
    for site in described.sites.values():
        if site.name not in removed:
            yield site.name, Cell(len(kept_units[site.name]), site.size)
    for layer in described.layers:
        columns = sum(part.size for part in layer.inp)
        for name, rows in factorisable_rows(layer).items():
            if name not in removed:
                full = min(columns, sum(part.size for part in rows))
                yield f"{name} rank", Cell(ranks.get(name, full), full)
