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

from timm.layers import LayerScale
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitrim.network.attention import SlicedAttention
from vitrim.network.dispatch import (
    UnsupportedArchitecture,
    drop_branch,
    fix_input_size,
    stream,
    structure,
)
from vitrim.network.heads import attention_of
from vitrim.network.mlp import mlp_of
from vitrim.network.stream import BranchStep, Stream
from vitrim.network.structure import ResidualBranch, Structure, joined


class OneBranch(nn.Module):
    """A pre-norm block with only one of its branches; the names of its modules are timm's."""

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        parts = dict(block.named_children())
        number = NUMBERS[name]
        for part in (f"norm{number}", name, f"ls{number}", f"drop_path{number}"):
            if part in parts:  # not every family has layer scales
                self.add_module(part, parts[part])
        self.branch = name
        self.training = block.training

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Map (..., D) to the same shape; attention masks are ignored."""
        output = x
        for part in self.children():
            output = part(output)
        return x + output


NUMBERS = {"attn": "1", "mlp": "2"}
"""The digit in the names of a branch's norm, layer scale and drop path."""


@structure.register
def _(net: VisionTransformer) -> Structure:
    described = [
        (_attention if kind == "attn" else mlp_of)(f"{name}.{kind}", block.get_submodule(kind))
        for name, block, kind in _branches(net)
    ]
    return replace(
        joined(described),
        branches=tuple(
            ResidualBranch(
                name=f"{name}.{kind}",
                block=name,
                modules=(
                    f"{name}.norm{NUMBERS[kind]}",
                    f"{name}.{kind}",
                    f"{name}.ls{NUMBERS[kind]}",
                ),
                ends=(f"{name}.attn.proj" if kind == "attn" else f"{name}.mlp.fc2",),
            )
            for name, _, kind in _branches(net)
        ),
    )


@drop_branch.register
def _(net: VisionTransformer, branch: str) -> None:
    name, _, kind = branch.rpartition(".")
    others = [other for path, _, other in _branches(net) if path == name and other != kind]
    block = net.get_submodule(name)
    remaining = OneBranch(block, others[0]) if others else nn.Identity().train(block.training)
    net.set_submodule(name, remaining)


@fix_input_size.register
def _(net: VisionTransformer, size: tuple[int, int]) -> None:
    if net.dynamic_img_size:
        net.set_input_size(
            img_size=size
        )  # resamples position embeddings, as every forward pass would


@stream.register
def _(net: VisionTransformer) -> Stream:
    reads_tokens = net.global_pool in ("token", "")
    n_classifiers = 1 + ("head_dist" in dict(net.named_children()))
    return Stream(
        embed=lambda images: net.norm_pre(net._pos_embed(net.patch_embed(images))),
        steps=tuple(_branch(*branch) for branch in _branches(net)),
        final_norm="norm",
        n_prefix_tokens=net.num_prefix_tokens,
        n_readout_tokens=min(net.num_prefix_tokens, n_classifiers) if reads_tokens else 0,
        norm_is_features=True,
    )


def _branch(name: str, block: nn.Module, kind: str) -> BranchStep:
    norm_name = f"norm{NUMBERS[kind]}"
    norm, inner = block.get_submodule(norm_name), block.get_submodule(kind)
    scale = block.get_submodule(f"ls{NUMBERS[kind]}")
    return BranchStep(
        name=f"{name}.{kind}",
        reader=f"{name}.{norm_name}",
        apply=lambda x: scale(inner(norm(x))),
        scale=scale.gamma.detach() if isinstance(scale, LayerScale) else None,
        tokens=lambda x: x,
    )


def _branches(net: VisionTransformer) -> Iterator[tuple[str, nn.Module, str]]:
    """Iterate over the branches that are not dropped: the block's path, the block, attn or mlp."""
    for index, block in enumerate(net.blocks):
        name = f"blocks.{index}"
        if type(block) is nn.Identity:
            continue  # both branches are dropped
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


def _attention(name: str, attn: TimmAttention) -> Structure:
    normed = "" if isinstance(attn.q_norm, nn.Identity) else "q and k are normalised over the head"
    scaled = "" if isinstance(attn.norm, nn.Identity) else "the attention output is normalised"
    return attention_of(name, attn, qk_locked=normed, v_locked=scaled)
