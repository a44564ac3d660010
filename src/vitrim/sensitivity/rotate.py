"""Other bases for the dims of heads, in which the network computes what it did before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitrim.network.structure import Attention, Site, Structure

Bases = Mapping[str, tuple[Tensor, Tensor]]
"""By query-key or value site, `rows` and `columns` (heads, K, K), padded with zeros."""


def bases_of(rotations: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return `rows` and `columns` of all heads, (heads, K, K), of heads of several widths."""
    widest = max(len(rows) for rows, _ in rotations)

    def padded(matrix: Tensor) -> Tensor:
        pad = widest - len(matrix)
        return nn.functional.pad(matrix, (0, pad, 0, pad))

    rows, columns = zip(*rotations, strict=True)
    return torch.stack([*map(padded, rows)]), torch.stack([*map(padded, columns)])


@torch.no_grad()
def rotate_(net: nn.Module, described: Structure, bases: Bases) -> nn.Module:
    """Give the dims of heads other bases in place and return the network.

    Directions of a head are its units from then on. Queries are mapped by `rows` and keys by
    `columns`, whose product is the identity; values by `rows`, and the layer that reads them by
    `columns`.
    """
    for attention in described.attentions:
        for name in (attention.qk, attention.v):
            if name in bases:
                _rotate_site(net, described, attention, described.sites[name], *bases[name])
    return net


def _rotate_site(
    net: nn.Module,
    described: Structure,
    attention: Attention,
    site: Site,
    rows: Tensor,
    columns: Tensor,
) -> None:
    of_rows = [_by_head(site, rows), _by_head(site, columns if site.kind == "qk" else rows)]
    for layer in described.layers:
        if layer.branch != attention.branch:
            continue
        module = net.get_submodule(layer.name)
        offsets = [part.offset for part in layer.out if part.site == site.name]
        for offset, apply in zip(offsets, of_rows, strict=False):
            for parameter in module.parameters():
                part = parameter[offset : offset + site.size]
                part.copy_(apply(part.double()))
        if any(part.site == site.name for part in layer.inp):
            weight = module.get_parameter("weight")
            weight.copy_(_by_head(site, columns.mT)(weight.double().mT).mT)
    for item in described.per_head_parameters:
        if item.site == site.name and site.kind == "v":
            bias = net.get_parameter(item.name)
            bias.copy_(of_rows[0](bias.double()))


def _by_head(site: Site, matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what maps rows (units, ...) by the matrix of each head."""

    def apply(x: Tensor) -> Tensor:
        parts = torch.split(x, list(site.head_dims))
        return torch.cat(
            [
                matrix[: len(part), : len(part)].to(part) @ part
                for matrix, part in zip(matrices, parts, strict=True)
            ]
        )

    return apply
