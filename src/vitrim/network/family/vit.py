"""The plain vision transformer family: ViT, DeiT, DeiT3, DINOv2, CLIP and SigLIP towers of timm.

Sites of block i (D embed, H heads, K head dim, M mlp hidden):
    blocks.i.attn.input   (D,)    columns of qkv      the norm's output, gathered
    blocks.i.attn.heads   (H,)    whole heads
    blocks.i.attn.qk      (H*K,)  query and key rows, free in every head
    blocks.i.attn.v       (H*K,)  value rows and proj columns, free in every head
    blocks.i.mlp.input    (D,)    columns of fc1      the norm's output, gathered
    blocks.i.mlp.hidden   (M,)    rows of fc1 and columns of fc2
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from timm.layers import LayerScale
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitrim.network.attention import SlicedAttention
from vitrim.network.dispatch import UnsupportedArchitecture, drop, settle, stream, structure
from vitrim.network.heads import attention_of
from vitrim.network.mlp import mlp_of
from vitrim.network.stream import Branch, Stream
from vitrim.network.structure import Residual, Structure, joined


class OneBranch(nn.Module):
    """What is left of a pre-norm block once one of its branches is dropped; names stay timm's."""

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        parts = dict(block.named_children())
        place = PLACES[name]
        for part in (f"norm{place}", name, f"ls{place}", f"drop_path{place}"):
            if part in parts:  # not every family scales its layers
                self.add_module(part, parts[part])
        self.branch = name
        self.training = block.training

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Map (..., D) to the same shape; attention masks are for attentions only."""
        inner = x
        for part in self.children():
            inner = part(inner)
        return x + inner


PLACES = {"attn": "1", "mlp": "2"}
"""The digit that a branch's norm, layer scale and drop path have in their names."""


@structure.register
def _(net: VisionTransformer) -> Structure:
    found = [
        (_attention if kind == "attn" else mlp_of)(f"{name}.{kind}", block.get_submodule(kind))
        for name, block, kind in _branches(net)
    ]
    return replace(
        joined(found),
        branches=tuple(
            Residual(
                name=f"{name}.{kind}",
                block=name,
                modules=(
                    f"{name}.norm{PLACES[kind]}",
                    f"{name}.{kind}",
                    f"{name}.ls{PLACES[kind]}",
                ),
                ends=(f"{name}.attn.proj" if kind == "attn" else f"{name}.mlp.fc2",),
            )
            for name, _, kind in _branches(net)
        ),
    )


@drop.register
def _(net: VisionTransformer, branch: str) -> None:
    name, _, kind = branch.rpartition(".")
    left = [other for at, _, other in _branches(net) if at == name and other != kind]
    block = net.get_submodule(name)
    one = OneBranch(block, left[0]) if left else nn.Identity().train(block.training)
    net.set_submodule(name, one)


@settle.register
def _(net: VisionTransformer, size: tuple[int, int]) -> None:
    if net.dynamic_img_size:
        net.set_input_size(img_size=size)  # resamples positions as every forward pass would


@stream.register
def _(net: VisionTransformer) -> Stream:
    reads_tokens = net.global_pool in ("token", "")
    return Stream(
        embed=lambda images: net.norm_pre(net._pos_embed(net.patch_embed(images))),
        steps=tuple(_branch(*branch) for branch in _branches(net)),
        after="norm",
        prefix=net.num_prefix_tokens,
        readout=min(net.num_prefix_tokens, 1 + hasattr(net, "head_dist")) if reads_tokens else 0,
        alone=True,
    )


def _branch(name: str, block: nn.Module, kind: str) -> Branch:
    before = f"norm{PLACES[kind]}"
    norm, inner = block.get_submodule(before), block.get_submodule(kind)
    scale = block.get_submodule(f"ls{PLACES[kind]}")
    return Branch(
        name=f"{name}.{kind}",
        before=f"{name}.{before}",
        apply=lambda x: scale(inner(norm(x))),
        scale=scale.gamma.detach() if isinstance(scale, LayerScale) else None,
        tokens=lambda x: x,
    )


def _branches(net: VisionTransformer) -> Iterator[tuple[str, nn.Module, str]]:
    """Iterate over the branches there are: the block's path, the block, attn or mlp."""
    for index, block in enumerate(net.blocks):
        name = f"blocks.{index}"
        if type(block) is nn.Identity:
            continue  # both are dropped
        if isinstance(block, OneBranch):
            yield name, block, block.branch
            continue
        if type(block) is not Block or not isinstance(block.attn, (TimmAttention, SlicedAttention)):
            raise UnsupportedArchitecture(
                f"{type(net).__name__} with {type(block).__name__} and "
                f"{type(getattr(block, 'attn', None)).__name__} cannot be cut; "
                "supported: Block with Attention, and Mlp, GluMlp or SwiGLU"
            )
        yield name, block, "attn"
        yield name, block, "mlp"


def _attention(name: str, attn: Any) -> Structure:
    normed = "" if isinstance(attn.q_norm, nn.Identity) else "q and k are normalised over the head"
    scaled = "" if isinstance(attn.norm, nn.Identity) else "the attention output is normalised"
    return attention_of(name, attn, fixed=normed, scaled=scaled)
