"""Cutting DeiT-B: against torch-pruning, and against the time of copying what is kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch_pruning as tp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import vitrim

from .timing import Row, Side, take_turns

MODEL = {"name": "deit_base_patch16_224", "args": {}}
GONE = 0.4
"""Share of the hidden units, and of the query-key and value dims of every head, to remove."""


def dense_net() -> nn.Module:
    """Return DeiT-B with random weights."""
    torch.manual_seed(0)
    return timm.create_model(MODEL["name"]).eval()


def orders(net: nn.Module) -> dict[str, Tensor]:
    """Return a random rank per unit: of the hidden units, and of one head's dims for all its heads.

    torch-pruning removes the same dims from every head, and the same from queries, keys and values.
    """
    generator = torch.Generator().manual_seed(0)
    ranks = {}
    for index, block in enumerate(net.blocks):
        heads, dim = block.attn.num_heads, block.attn.head_dim
        hidden = block.mlp.fc1.out_features
        ranks[f"blocks.{index}.mlp"] = torch.randperm(hidden, generator=generator)
        ranks[f"blocks.{index}.attn"] = torch.randperm(dim, generator=generator).repeat(heads)
    return ranks


def kept(rank: Tensor) -> tuple[int, ...]:
    """Return the units that survive, ascending; as torch-pruning rounds, int(60 %) of a head."""
    size = int(rank.max()) + 1
    return tuple((rank >= size - int(size * (1 - GONE))).nonzero()[:, 0].tolist())


def plan_of(ranks: Mapping[str, Tensor]) -> vitrim.Plan:
    """Return the plan that removes what torch-pruning removes."""
    sites = {"attn": ("qk", "v"), "mlp": ("hidden",)}
    edits = [
        vitrim.Keep(site=f"{branch}.{site}", index=kept(rank))
        for branch, rank in ranks.items()
        for site in sites[branch.rpartition(".")[2]]
    ]
    return vitrim.Plan(model=MODEL, edits=tuple(edits))


def rows(repeats: int) -> list[Row]:
    """Return both comparisons, and for information torch-pruning's parts.

    The plan and torch-pruning's importance are made beforehand. Our cut copies the network;
    torch-pruning works in place, and the copy it is given is made before its clock starts.
    """
    dense = dense_net()
    ranks = orders(dense)
    plan = plan_of(ranks)
    compact = vitrim.cut(dense, plan)
    _check_equal(compact, _with_pruner(copy.deepcopy(dense), ranks))
    _check_equal(compact, _with_graph(_graph(copy.deepcopy(dense)), ranks))
    tensors = compact.state_dict().values()
    ours = Side(work=lambda _: vitrim.cut(dense, plan))
    peers = {
        "pruner": Side(
            prepare=lambda: copy.deepcopy(dense), work=lambda net: _with_pruner(net, ranks)
        ),
        "graph": Side(prepare=lambda: copy.deepcopy(dense), work=_graph),
        "groups": Side(
            prepare=lambda: copy.deepcopy(dense), work=lambda net: _with_graph(_graph(net), ranks)
        ),
    }
    slow = take_turns({"ours": ours, **peers}, repeats)
    copies = {"ours": ours, "copy": Side(work=lambda _: [tensor.clone() for tensor in tensors])}
    quick = take_turns(copies, 3 * repeats)
    name = f"cut DeiT-B to {sum(p.numel() for p in compact.parameters()) / 1e6:.1f} M params"
    labels = {
        "pruner": ("torch-pruning: pruner + step", 8.0),
        "groups": ("  its graph + groups, no pruner", None),
        "graph": ("  its graph alone", None),
    }
    return [
        *(
            Row(
                name=name,
                peer=label,
                ours_s=slow["ours"],
                peer_s=slow[key],
                kind="faster",
                limit=limit,
            )
            for key, (label, limit) in labels.items()
        ),
        Row(
            name=name,
            peer="copying the kept bytes",
            ours_s=quick["ours"],
            peer_s=quick["copy"],
            kind="cost",
            limit=4.0,
        ),
    ]


def _blocks(net: nn.Module) -> dict[str, Block]:
    return {f"blocks.{index}": block for index, block in enumerate(net.blocks)}


def _with_pruner(net: nn.Module, ranks: Mapping[str, Tensor]) -> nn.Module:
    """Prune `net` in place as torch-pruning's examples prune timm's networks."""
    roots = {
        module: ranks[f"{name}.{branch}"]
        for name, block in _blocks(net).items()
        for branch, module in (("attn", block.attn.proj), ("mlp", block.mlp.fc1))
    }
    outer = [module for block in net.blocks for module in (block.attn.proj, block.mlp.fc2)]
    with warnings.catch_warnings(action="ignore"):  # it names the parameters outside of layers
        pruner = tp.pruner.MetaPruner(
            net,
            torch.zeros(1, 3, 224, 224),
            importance=lambda group: roots[group[0].dep.target.module].float(),
            pruning_ratio=GONE,
            num_heads={block.attn.qkv: block.attn.num_heads for block in net.blocks},
            prune_head_dims=True,
            ignored_layers=[net.patch_embed, net.head, *outer],  # the residual stream stays
        )
    pruner.step()
    return _resized(net)


_Built = tuple[nn.Module, Any]


def _graph(net: nn.Module) -> _Built:
    with warnings.catch_warnings(action="ignore"):
        graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 224, 224))
    return net, graph


def _with_graph(built: _Built, ranks: Mapping[str, Tensor]) -> nn.Module:
    """Prune `net` in place by torch-pruning's groups, without its pruner."""
    net, graph = built
    for name, block in _blocks(net).items():
        for layer, prune, branch in (
            (block.attn.proj, tp.prune_linear_in_channels, "attn"),
            (block.mlp.fc1, tp.prune_linear_out_channels, "mlp"),
        ):
            rank = ranks[f"{name}.{branch}"]
            gone = sorted(set(range(len(rank))) - set(kept(rank)))
            graph.get_pruning_group(layer, prune, gone).prune()
    return _resized(net)


def _resized(net: nn.Module) -> nn.Module:
    """Tell timm's attention its new widths, which torch-pruning leaves to the caller."""
    for block in net.blocks:
        block.attn.attn_dim = block.attn.proj.in_features
        block.attn.head_dim = block.attn.attn_dim // block.attn.num_heads
    return net


def _check_equal(ours: nn.Module, peer: nn.Module) -> None:
    """Raise unless both did the same work: the same tensors, bit by bit."""
    left, right = ours.state_dict(), peer.state_dict()
    differing = [
        name for name in left.keys() | right.keys() if not torch.equal(left[name], right[name])
    ]
    if differing:
        raise AssertionError(f"vitrim and torch-pruning disagree on {sorted(differing)[:3]}")
