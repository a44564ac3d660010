"""SmoothQuant's scaling: the network computes the same, and outliers cost less in int8."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
from torch import nn

from families import SWIN
from nets import MODEL, images, outputs, plan_of, randomise, relative_error, small_net
from vitrim import Int8, LowRank, Plan, cut
from vitrim.errors import VitrimError
from vitrim.network import UnsupportedArchitecture, structure
from vitrim.network.int8 import int8_edits
from vitrim.network.smooth import smooth_

EMPTY = Plan(model=MODEL, edits=())
CUT = Plan(
    model=MODEL,
    edits=(
        *plan_of({"blocks.0.attn.input": (0, 3, 5, 23), "blocks.1.mlp.input": (7, 11)}).edits,
        LowRank(linear="blocks.0.mlp.fc1", rank=5),
        LowRank(linear="blocks.1.attn.qkv.k", rank=2),
    ),
)


@cache
def swin() -> nn.Module:
    net = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **SWIN)
    return randomise(net.double())


def with_outliers() -> nn.Module:
    """Return a ViT two of whose channels are 50 times as large after every norm as the others."""
    net = small_net(depth=3)
    with torch.no_grad():
        for block in net.blocks:
            for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                for tensor in (norm.weight, norm.bias):
                    tensor[3:5] *= 50
                reader.weight[:, 3:5] /= 50
    return net


@pytest.mark.parametrize("case", ["dense", "cut", "swin"])
def test_the_network_computes_the_same(case: str) -> None:
    net = swin() if case == "swin" else cut(small_net(), CUT if case == "cut" else EMPTY)
    smoothed = smooth_(copy.deepcopy(net), [images(), images(batch=1)], exponent=0.5)
    assert relative_error(outputs(smoothed, images()), outputs(net, images())) <= 1e-12
    changed = {
        name
        for name, tensor in smoothed.state_dict().items()
        if not torch.equal(tensor, net.state_dict()[name])
    }
    norms = {name for name in changed if "norm" in name}
    assert len(norms) == 2 * len(structure(net).branches)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed - norms} <= {
        *("qkv", "fc1", "q", "k", "v", "down")
    }


def test_outliers_cost_less_in_int8() -> None:
    net, x = with_outliers(), images(batch=16)
    errors = []
    for smooth in (False, True):
        float_net = smooth_(copy.deepcopy(net), [x], exponent=0.5) if smooth else net
        edits = int8_edits(float_net, structure(float_net), dynamic=True)
        int8 = cut(float_net, Plan(model=MODEL, edits=edits))
        errors.append(relative_error(outputs(int8, x), outputs(net, x)))
    assert errors[1] < 0.7 * errors[0]


def test_layers_that_are_int8_are_left_alone() -> None:
    net = cut(small_net(), Plan(model=MODEL, edits=(Int8(linear="blocks.0.mlp.fc1"),)))
    smoothed = smooth_(copy.deepcopy(net), [images()], exponent=0.5)
    assert torch.equal(smoothed.blocks[0].norm2.weight, net.blocks[0].norm2.weight)
    assert not torch.equal(smoothed.blocks[0].norm1.weight, net.blocks[0].norm1.weight)


def test_what_cannot_be_smoothed_is_refused() -> None:
    with pytest.raises(VitrimError, match="needs images"):
        smooth_(small_net(), [], exponent=0.5)
    with pytest.raises(UnsupportedArchitecture, match="no residual stream"):
        smooth_(randomise(timm.create_model("convnext_atto")), [images()], exponent=0.5)
