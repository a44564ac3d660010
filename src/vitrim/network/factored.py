"""Linear layers in two factors, and a Linear whose runs of rows are layers of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitrim.network.structure import Layer, full


class LowRankLinear(nn.Module):
    """A Linear of rank r: y = up(down(x)), down of shape (r, in) without bias, up (out, r) with it.

    `down` may read part of a wider input, as the layer it comes from may (`GatheredLinear`).
    """

    down: nn.Linear
    up: nn.Linear

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down = down
        self.up = up

    @property
    def in_features(self) -> int:
        """Columns of `down`."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Rows of `up`."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Rows of `down`, columns of `up`."""
        return self.up.in_features

    @property
    def bias(self) -> Tensor | None:
        """That of `up`."""
        return self.up.bias

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        output: Tensor = self.up(self.down(input))
        return output


class SplitLinear(nn.Module):
    """Linears that read the same input, their outputs side by side: query, key and value rows."""

    def __init__(self, pieces: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.pieces = tuple(pieces)
        for name, piece in pieces.items():
            self.add_module(name, piece)

    @property
    def in_features(self) -> int:
        """Columns of every piece."""
        return int(self.get_submodule(self.pieces[0]).in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Rows of all pieces."""
        widths = [self.get_submodule(name).out_features for name in self.pieces]
        return sum(widths)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return torch.cat([self.get_submodule(name)(input) for name in self.pieces], dim=-1)


def layers_of(module: nn.Module, whole: Layer) -> tuple[Layer, ...]:
    """Return `whole`, or what the module at its name consists of: pieces, and of them factors."""
    if isinstance(module, SplitLinear):
        return tuple(
            layer
            for name, part in zip(module.pieces, whole.out, strict=True)
            for layer in layers_of(
                module.get_submodule(name),
                replace(
                    whole, name=f"{whole.name}.{name}", out=(replace(part, offset=0),), pieces=()
                ),
            )
        )
    if isinstance(module, LowRankLinear):
        inner = full(module.rank)
        down = replace(whole, name=f"{whole.name}.down", out=inner, pieces=(), factor=True)
        up = replace(
            whole, name=f"{whole.name}.up", inp=inner, gathers=False, pieces=(), factor=True
        )
        return down, up
    return (whole,)


def low_rank_layers(net: nn.Module, branch: str) -> Iterator[tuple[str, str, int]]:
    """Iterate over the low-rank layers of a branch: the path, the whole layer's, and its row there.

    They differ where the layer is a piece of a whole one.
    """
    for name, module in net.get_submodule(branch).named_modules(prefix=branch):
        if not isinstance(module, LowRankLinear):
            continue
        above, _, piece = name.rpartition(".")
        pieces: tuple[str, ...] = getattr(net.get_submodule(above), "pieces", ())
        if not pieces:
            yield name, name, 0
            continue
        before = [net.get_submodule(f"{above}.{p}") for p in pieces[: pieces.index(piece)]]
        widths: list[int] = [part.out_features for part in before]  # type: ignore[misc]
        yield name, above, sum(widths)
