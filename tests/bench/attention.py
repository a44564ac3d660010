"""SlicedAttention after three kinds of cut: forward time, and MACs, over the dense attention's."""

from __future__ import annotations

import copy

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitrim

from .timing import Row, Side, take_turns

BATCH, TOKENS, EMBED, HEADS, DIM = 8, 197, 768, 12, 64
KEPT = 0.6


def rows(repeats: int) -> list[Row]:
    """Return the forward times over that of timm's attention, at the width of ViT-B."""
    torch.manual_seed(0)
    net = timm.create_model("vit_base_patch16_224", depth=1).eval()
    dense = net.blocks[0].attn
    x_BND = torch.randn(BATCH, TOKENS, EMBED)
    cuts = {
        "equal heads": (_alike(int(KEPT * DIM)), _alike(int(KEPT * DIM))),
        "query-key 30, value 46": (_alike(30), _alike(46)),
        "ragged heads": (_ragged(0), _ragged(1)),
    }
    attentions = {name: _cut(net, *kept) for name, kept in cuts.items()}
    sides = {name: _forward(module, x_BND) for name, module in attentions.items()}
    seconds = take_turns({"dense": _forward(dense, x_BND), **sides}, 5 * repeats)
    return [
        Row(
            name=f"attention, {name}",
            peer="timm's dense attention",
            ours_s=seconds[name],
            peer_s=seconds["dense"],
            kind="cost",
            note=f"MACs {_macs(module, x_BND) / _macs(dense, x_BND):.2f}",
        )
        for name, module in attentions.items()
    ]


def _alike(dims: int) -> Tensor:
    """Keep the first `dims` dims of every head; returns the kept units."""
    return (torch.arange(HEADS * DIM) % DIM < dims).nonzero()[:, 0]


def _ragged(seed: int) -> Tensor:
    """Keep 60 % of all dims, more in some heads than in others; returns the kept units."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(HEADS, DIM, generator=generator)
    between = torch.rand(HEADS, 1, generator=generator)
    ranked = (within + between).flatten().argsort(descending=True)
    return ranked[: int(KEPT * HEADS * DIM)].sort().values


def _cut(net: nn.Module, qk: Tensor, v: Tensor) -> nn.Module:
    edits = tuple(
        vitrim.Keep(site=f"blocks.0.attn.{site}", index=tuple(index.tolist()))
        for site, index in (("qk", qk), ("v", v))
    )
    return vitrim.cut(net, vitrim.Plan(model={}, edits=edits)).blocks[0].attn


def _forward(module: nn.Module, x_BND: Tensor) -> Side:
    def work(_: None) -> None:
        with torch.inference_mode():
            module(x_BND)

    return Side(work=work)


def _macs(module: nn.Module, x_BND: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(module).to("meta")(x_BND.to("meta"))
    return counter.get_total_flops() // 2
