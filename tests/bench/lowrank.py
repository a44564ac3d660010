"""Low rank: decomposing DeiT-B, the statistics for it, and the speed of what comes out."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim.method.mixed_rank.method import MixedRank
from vitrim.network.decompose import decompose
from vitrim.network.factored import LowRankLinear
from vitrim.trainer.activations import capture

from .scoring import DEIT, NETS, against_forward, method_of, net_of
from .timing import Row, Side, take_turns


def rows(repeats: int) -> list[Row]:
    """Return decompositions against the usual way, statistics, and layers against dense ones."""
    found = [_decomposing(max(1, repeats // 3))]
    found += [_statistics(name, repeats) for name in NETS]
    return [*found, *(_layers(batch, repeats) for batch in (1, 16))]


def _linears(net: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in net.blocks.named_modules() if isinstance(m, nn.Linear)}  # type: ignore[union-attr]


def _decomposing(repeats: int) -> Row:
    net = net_of(DEIT)
    layers, moments = _linears(net), {}
    with torch.no_grad(), capture(net.blocks, [(name, False) for name in layers]) as flows:
        net(torch.randn(24, 3, 224, 224))
    for name in layers:
        x = flows[name].flatten(0, -2)
        moments[name] = (x.T @ x / len(x)).double()

    def usual(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of all ranks by Cholesky and SVD in float64."""
        eye = torch.eye(len(moment), dtype=torch.float64)
        root = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * eye)
        u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
        down = torch.linalg.solve_triangular(root, v, upper=False, left=False)
        return u * s, down

    def all_of(how: Any) -> list[Any]:
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        return [how(weight, moments[name]) for name, weight in weights.items()]

    worst = max(
        _excess(layers[name].weight.detach(), moments[name], usual) for name in [*layers][:4]
    )
    sides = {
        "ours": Side(work=lambda _: all_of(decompose)),
        "peer": Side(work=lambda _: all_of(usual)),
    }
    seconds = take_turns(sides, repeats)
    return Row(
        name=f"decompose 48 Linears of DeiT-B (excess error at most {worst:.0e})",
        peer="Cholesky and SVD in float64",
        ours_s=seconds["ours"],
        peer_s=seconds["peer"],
        kind="faster",
        limit=4.5,
    )


def _excess(weight: Tensor, moment: Tensor, usual: Any) -> float:
    """Return by how much more of the output's energy ours loses at a third of the ranks."""
    rank = min(weight.shape) // 3

    def lost(up: Tensor, down: Tensor) -> float:
        off = weight.double() - up.double() @ down.double()
        return float((off @ moment * off).sum())

    best = usual(weight, moment)
    whole = float((weight.double() @ moment * weight.double()).sum())
    ours = lost(*decompose(weight, moment).factors(rank))
    return max(0.0, ours - lost(best[0][:, :rank], best[1][:rank])) / whole


def _statistics(name: str, repeats: int) -> Row:
    net = net_of(name)
    method: MixedRank = method_of("mixed_rank", name)
    phase = method.scorer(net)
    of_each_batch = NETS[name] * method.gradient_images / method.sampling.images
    phase.gradient_images = round(of_each_batch)

    def step(x: Tensor) -> None:
        phase.training_step((x, None), 0)
        phase._n_seen = 0

    return against_forward("statistics of", name, net, step, repeats)


def _layers(batch: int, repeats: int) -> Row:
    """Return the slowest of the layers of both networks at their highest rank, against its twin."""
    slowest: dict[str, Any] | None = None
    for name in NETS:
        share = method_of("mixed_rank", name).max_rank_fraction
        for kind, layer in [*_linears(timm.create_model(name)).items()][:4]:
            rows, columns = layer.weight.shape
            rank = math.floor(share * ((rows * columns - 1) // (rows + columns)))
            low = LowRankLinear(nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows))
            x = torch.randn(batch, 197, columns)
            sides = {
                "ours": Side(work=lambda _, low=low, x=x: _twenty(low, x)),
                "peer": Side(work=lambda _, layer=layer, x=x: _twenty(layer, x)),
            }
            seconds = take_turns(sides, 3 * repeats)
            ratio = sorted(o / p for o, p in zip(seconds["ours"], seconds["peer"], strict=True))
            median = ratio[len(ratio) // 2]
            if slowest is None or median > slowest["ratio"]:
                label = f"{name.split('_patch')[0]} {kind.partition('.')[2]} at rank {rank}"
                slowest = {"ratio": median, "label": label, **seconds}
    assert slowest is not None
    return Row(
        name=f"slowest low-rank layer, batch {batch}: {slowest['label']}",
        peer="the dense layer",
        ours_s=slowest["ours"],
        peer_s=slowest["peer"],
        kind="cost",
        limit=1.02,
    )


@torch.no_grad()
def _twenty(layer: nn.Module, x: Tensor) -> None:
    for _ in range(20):
        layer(x)
