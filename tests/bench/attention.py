"""SlicedAttention after three kinds of cut: forward time, and MACs, over the dense attention's.

Each is timed in every arrangement of its heads that makes a difference, for one image and for 64;
and a training step of heads of several widths, with the activations that it keeps.
"""

from __future__ import annotations

import copy

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from vitrim.network.head_runs import Arrangement, arrange_heads

from .timing import Row, Side, take_turns

BATCHES, TRAINED = (1, 64), 8
TOKENS, EMBED, HEADS, DIM = 197, 768, 12, 64
KEPT = 0.6


def rows(repeats: int) -> list[Row]:
    """Return the forward times over that of timm's attention, at the width of ViT-B."""
    torch.manual_seed(0)
    net = timm.create_model("vit_base_patch16_224", depth=1).eval()
    equal, unequal = (_alike(38), _alike(38)), (_alike(30), _alike(46))
    ragged = (_ragged(0), _ragged(1))
    cuts: dict[str, tuple[tuple[Tensor, Tensor], tuple[Arrangement, ...]]] = {
        "equal heads": (equal, ("runs",)),
        "query-key 30, value 46": (unequal, ("runs", "fused")),
        "ragged heads": (ragged, ("runs", "fused", "padded")),
    }
    attentions = {
        f"{name}, {arrangement}": (_cut(net, *kept), arrangement)
        for name, (kept, arrangements) in cuts.items()
        for arrangement in arrangements
    }
    modules = {name: arrange_heads(module, how) for name, (module, how) in attentions.items()}
    macs = {name: _macs(module) for name, module in modules.items()}
    dense = net.blocks[0].attn
    found = []
    for batch in BATCHES:
        x_BND = torch.randn(batch, TOKENS, EMBED)
        sides = {name: _forward(module, x_BND) for name, module in modules.items()}
        turns = 5 * repeats if batch == 1 else repeats
        seconds = take_turns({"dense": _forward(dense, x_BND), **sides}, turns)
        found += [
            Row(
                name=f"attention, {name}, batch {batch}",
                peer="timm's dense attention",
                ours_s=seconds[name],
                peer_s=seconds["dense"],
                kind="cost",
                note=f"MACs {macs[name] / _macs(dense):.2f}",
            )
            for name in modules
        ]
    trained = {name: module for name, module in modules.items() if name.startswith("ragged")}
    return [*found, *_training(trained, dense, repeats)]


def _training(modules: dict[str, nn.Module], dense: nn.Module, repeats: int) -> list[Row]:
    """Return the times of a training step, and the activations kept for its backward pass."""
    x_BND = torch.randn(TRAINED, TOKENS, EMBED, requires_grad=True)
    sides = {name: _step(module.train(), x_BND) for name, module in modules.items()}
    seconds = take_turns({"dense": _step(dense.train(), x_BND), **sides}, 2 * repeats)
    return [
        Row(
            name=f"attention step, {name}, batch {TRAINED}",
            peer=f"timm's dense attention, {_kept_mb(dense, x_BND):.0f} MB kept",
            ours_s=seconds[name],
            peer_s=seconds["dense"],
            kind="cost",
            note=f"{_kept_mb(module, x_BND):.0f} MB kept",
        )
        for name, module in modules.items()
    ]


def _step(module: nn.Module, x_BND: Tensor) -> Side:
    return Side(work=lambda _: module(x_BND).sum().backward())


def _kept_mb(module: nn.Module, x_BND: Tensor) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(x_BND)
    del output  # it holds what was kept until here, so that no storage is taken twice
    return sum(kept.values()) / 1e6


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


def _macs(module: nn.Module) -> int:
    """Return the multiply-accumulates for one image, without those of padding."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin = arrange_heads(copy.deepcopy(module), "runs").to("meta")
        twin(torch.empty(1, TOKENS, EMBED, device="meta"))
    return counter.get_total_flops() // 2
