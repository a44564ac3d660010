"""Low-rank Linear layers, and a Linear whose runs of rows are layers of their own.

Annotations are evaluated here, because TorchScript reads no strings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitrim.network.int8_linear import Int8Linear
from vitrim.network.structure import Layer, full


class LowRankLinear(nn.Module):
    """A Linear of rank r: y = up(down(x)), with down (r, in) without bias and up (out, r).

    `down` may read part of a wider input, as the layer that it replaces may (`GatheredLinear`).
    """

    __jit_unused_properties__ = ("in_features", "out_features", "rank", "weight", "bias")

    def __init__(self, down: nn.Module, up: nn.Linear) -> None:
        super().__init__()
        self.down = down
        self.up = up

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.down.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Rows of `up`."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Rows of `down`, columns of `up`."""
        return self.up.in_features

    @property
    def weight(self) -> Tensor:
        """The product of the factors, (out, in): what code that expects a Linear reads."""
        return self.up.weight @ _tensor(self.down.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of `up`."""
        return self.up.bias

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        output: Tensor = self.up(self.down(input))
        return output


class SplitLinear(nn.Module):
    """Linears `q`, `k` and `v` that read the same input, their outputs concatenated."""

    __jit_unused_properties__ = ("in_features", "out_features", "weight", "bias")

    def __init__(self, pieces: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.pieces = ("q", "k", "v")
        self.q, self.k, self.v = (pieces[name] for name in self.pieces)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.q.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Rows of all pieces."""
        return sum(widths_of_layer(self.get_submodule(name))[1] for name in self.pieces)

    @property
    def weight(self) -> Tensor:
        """The weights of all pieces, (out, in): what code that expects a Linear reads."""
        return torch.cat([_tensor(self.get_submodule(name).weight) for name in self.pieces])

    @property
    def bias(self) -> Tensor | None:
        """The biases of all pieces, (out,); None where they have none."""
        biases = [self.get_submodule(name).bias for name in self.pieces]
        return None if biases[0] is None else torch.cat([_tensor(bias) for bias in biases])

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return torch.cat([self.q(input), self.k(input), self.v(input)], dim=-1)


def _tensor(value: Tensor | nn.Module | None) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def widths_of_layer(module: nn.Module) -> tuple[int, int]:
    """Return the number of columns and rows of a Linear, low-rank layer or Conv.

    A Linear behind a gather has fewer columns than its input.
    """
    match module:
        case nn.Conv2d():
            return module.in_channels, module.out_channels
        case LowRankLinear():
            return widths_of_layer(module.down)[0], module.out_features
        case SplitLinear():
            return widths_of_layer(module.q)[0], module.out_features
        case Int8Linear():
            return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(f"{type(module).__name__}: expected a Linear or a Conv2d")
    return weight.shape[1], weight.shape[0]


def layers_of(module: nn.Module, layer: Layer) -> tuple[Layer, ...]:
    """Return `layer`, or the layers that the module at its name consists of: pieces and factors."""
    if isinstance(module, SplitLinear):
        return tuple(
            inner
            for name, part in zip(module.pieces, layer.out, strict=True)
            for inner in layers_of(
                module.get_submodule(name),
                replace(
                    layer, name=f"{layer.name}.{name}", out=(replace(part, offset=0),), pieces=()
                ),
            )
        )
    if isinstance(module, LowRankLinear):
        rank = full(module.rank)
        down = replace(layer, name=f"{layer.name}.down", out=rank, pieces=(), factor=True)
        up = replace(
            layer, name=f"{layer.name}.up", inp=rank, gathers=False, pieces=(), factor=True
        )
        return down, up
    return (layer,)


def low_rank_layers(net: nn.Module, branch: str) -> Iterator[tuple[str, str, int]]:
    """Iterate over the low-rank layers of a branch: path, path in the dense network, first row.

    The dense path differs where the low-rank layer is a piece of a dense layer; the row is then the
    first that the piece has in the dense layer.
    """
    for name, module in net.get_submodule(branch).named_modules(prefix=branch):
        if not isinstance(module, LowRankLinear):
            continue
        parent_name, _, piece = name.rpartition(".")
        parent = net.get_submodule(parent_name)
        if not isinstance(parent, SplitLinear):
            yield name, name, 0
            continue
        before = parent.pieces[: parent.pieces.index(piece)]
        rows = sum(widths_of_layer(parent.get_submodule(path))[1] for path in before)
        yield name, parent_name, rows
