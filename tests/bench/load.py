"""Loading a compact DeiT-B: against building the dense one, cutting it, and loading its tensors."""

from __future__ import annotations

import tempfile
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import nn

import vitrim

from .cut import MODEL, dense_net, orders, plan_of
from .timing import Row, Side, take_turns


def rows(repeats: int) -> list[Row]:
    """Return the comparison; ours verifies the checksums, the peer has none."""
    dense = dense_net()
    plan = plan_of(orders(dense))
    with tempfile.TemporaryDirectory() as folder:
        vitrim.save(folder, vitrim.cut(dense, plan), plan)
        _check_equal(vitrim.load(folder)[0], _build_cut_load(folder, plan))
        sides = {
            "ours": Side(work=lambda _: vitrim.load(folder)),
            "peer": Side(work=lambda _: _build_cut_load(folder, plan)),
        }
        seconds = take_turns(sides, 3 * repeats)
    return [
        Row(
            name="load a compact DeiT-B",
            peer="create_model, cut, load_state_dict",
            ours_s=seconds["ours"],
            peer_s=seconds["peer"],
            kind="faster",
            limit=8.0,
        )
    ]


def _build_cut_load(folder: str, plan: vitrim.Plan) -> nn.Module:
    net = vitrim.cut(timm.create_model(MODEL["name"]), plan)
    net.load_state_dict(safetensors.torch.load_file(Path(folder) / "model.safetensors"))
    return net.eval()


def _check_equal(ours: nn.Module, peer: nn.Module) -> None:
    left, right = ours.state_dict(), peer.state_dict()
    if left.keys() != right.keys() or not all(torch.equal(left[n], right[n]) for n in left):
        raise AssertionError("vitrim.load and load_state_dict gave different tensors")
