"""Compact networks of all families: a small one each, with every kind of edit."""

from __future__ import annotations

from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from families import FAMILIES, SWIN
from nets import MODEL, TINY, images, plan_of, randomise
from vitrim import Drop, LowRank, Plan, cut
from vitrim.network import branches, sites, structure

NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (MODEL["name"], TINY | {"depth": 4}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN | {"depths": [4, 2]}),
    **{family: case[:2] for family, case in FAMILIES.items()},
}


@cache
def dense(family: str) -> nn.Module:
    name, args = NETS[family]
    return randomise(timm.create_model(name, pretrained=False, **args))


def plan(family: str) -> Plan:
    """Halve every site unevenly, factorise layers, drop an MLP, an attention and a block."""
    net, (name, args) = dense(family), NETS[family]
    described = structure(net)
    dropped = [*branches(net)[:2], branches(net)[3], branches(net)[4]] if branches(net) else []
    inside = tuple(f"{name}." for name in dropped)
    kept = {}
    for number, site in enumerate(sites(net).values()):
        if not site.name.startswith(inside or ("-",)) and site.kind != "heads":
            index = [unit for unit in range(site.size) if unit % 3 != number % 3]
            first = range(site.head_dims[0] if site.head_dims else 0)
            kept[site.name] = sorted({*index, *first})
    ranks = [
        LowRank(linear=piece, rank=2)
        for layer in described.layers
        if not layer.locked_reason and not layer.name.startswith(inside or ("-",))
        for piece in ([f"{layer.name}.q"] if layer.pieces else [layer.name])
    ]
    edits = (*(Drop(branch=name) for name in dropped), *plan_of(kept).edits, *ranks[::3])
    return Plan(model={"name": name, "args": args}, edits=edits)


@cache
def compact(family: str) -> nn.Module:
    return cut(dense(family), plan(family))


def x(family: str) -> Tensor:
    return images(int(NETS[family][1].get("img_size", 64)), dtype=torch.float32)
