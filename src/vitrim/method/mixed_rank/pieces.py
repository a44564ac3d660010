"""What mixed-rank compression can factorise: layers, and pieces of layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from vitrim.network.structure import Structure, factorisable_rows
from vitrim.plan import Evidence


class Piece(NamedTuple):
    """Rows of a layer: the layer's path, the first of its rows, their number, and its columns."""

    layer: str
    start: int
    rows: int
    columns: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return these rows of a tensor that has the rows of the layer."""
        return tensor.detach()[self.start : self.start + self.rows]

    def weight_in(self, net: nn.Module) -> Tensor:
        """Return these rows of the layer's weight."""
        return self.of(net.get_parameter(f"{self.layer}.weight"))


def pieces_of(described: Structure, kinds: Collection[str], *, separate: bool) -> dict[str, Piece]:
    """Return what can be factorised, by the names that plans use.

    Args:
        described: the network's structure.
        kinds: of layers, see `kind_of`.
        separate: whether query, key and value rows are pieces of their own.
    """
    return {
        name: piece
        for name, piece in _pieces(described, separate=separate)
        if kind_of(piece.layer) in kinds
    }


def _pieces(described: Structure, *, separate: bool) -> Iterator[tuple[str, Piece]]:
    for layer in described.layers:
        if layer.factor or layer.locked_reason:
            continue
        whole, *pieces = factorisable_rows(layer).items()
        columns = sum(part.size for part in layer.inp)
        for name, out in pieces if separate and pieces else [whole]:
            rows = sum(part.size for part in out)
            yield name, Piece(layer.name, out[0].offset, rows, columns)


def kind_of(layer: str) -> str:
    """Return the kind of the layer at a path: of pieces of qkv, and of both openers of a SwiGLU.

    >>> kind_of("blocks.0.attn.qkv.q"), kind_of("blocks.0.mlp.fc1_g"), kind_of("blocks.0.mlp.fc2")
    ('qkv', 'fc1', 'fc2')
    """
    *_, parent, name = ["", *layer.split(".")]
    return parent if parent == "qkv" else name.removesuffix("_g").removesuffix("_x")


def statistics_of(name: str, piece: Piece, evidence: Evidence) -> dict[str, Tensor]:
    """Return what is known of a piece: its layer's moments, and gradients by its own outputs."""
    statistics = {**evidence.moments.get(piece.layer, {}), **evidence.moments.get(name, {})}
    if "gradient_squares" in statistics:
        statistics["gradient_squares"] = piece.of(statistics["gradient_squares"])
    return statistics
