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
from typing import Any

from timm.layers import LayerScale
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitrim.model import UnsupportedArchitecture, drop, settle, stream, structure
from vitrim.model.attention import SlicedAttention, head_dims
from vitrim.model.lowrank import layers_of
from vitrim.model.mlp import mlp_of
from vitrim.model.site import Attention, Layer, Part, Residual, Site, Structure, full
from vitrim.model.stream import Branch, Stream


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
        _attention(name, block.attn)
        if kind == "attn"
        else (*mlp_of(f"{name}.mlp", block.get_submodule("mlp")), None)
        for name, block, kind in _branches(net)
    ]
    return Structure(
        sites={site.name: site for sites, _, _ in found for site in sites},
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
        layers=tuple(layer for _, layers, _ in found for layer in layers),
        attentions=tuple(attention for _, _, attention in found if attention is not None),
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


Found = tuple[tuple[Site, ...], tuple[Layer, ...], Attention | None]
"""Sites and layers of a branch, and what it is as an attention."""


def _attention(block_name: str, attn: Any) -> Found:
    normed = "" if isinstance(attn.q_norm, nn.Identity) else "q and k are normalised over the head"
    scaled = "" if isinstance(attn.norm, nn.Identity) else "the attention output is normalised"
    return attention_of(f"{block_name}.attn", attn, normed=normed, scaled=scaled)


def attention_of(
    name: str, attn: Any, *, normed: str = "", scaled: str = "", context: int | None = None
) -> Found:
    """Describe the attention at module path `name`, dense or cut.

    `normed` and `scaled` say why query-key dims, and heads and value dims, cannot be cut exactly;
    `context` is how many tokens each one attends to, as in `Attention`.
    """
    qk_dims, v_dims = head_dims(attn)
    qk, v = f"{name}.qk", f"{name}.v"
    dim = attn.qkv.in_features
    sites = (
        Site(name=f"{name}.input", size=dim),
        Site(name=f"{name}.heads", size=len(v_dims), locked=scaled),
        Site(name=qk, size=sum(qk_dims), head_dims=qk_dims, locked=normed),
        Site(name=v, size=sum(v_dims), head_dims=v_dims, locked=scaled),
    )
    q_size, v_size = sum(qk_dims), sum(v_dims)
    rows = (
        Part(site=qk, offset=0, size=q_size),
        Part(site=qk, offset=q_size, size=q_size),
        Part(site=v, offset=2 * q_size, size=v_size),
    )
    inner = (Part(site=v, offset=0, size=v_size),)
    columns = (Part(site=f"{name}.input", offset=0, size=dim),)
    qkv = Layer(
        name=f"{name}.qkv",
        branch=name,
        out=rows,
        inp=columns,
        gathers=True,
        pieces=("q", "k", "v"),
    )
    proj = Layer(name=f"{name}.proj", branch=name, out=full(attn.proj.out_features), inp=inner)
    layers = (*layers_of(attn.qkv, qkv), *layers_of(attn.proj, proj))
    if getattr(attn, "gate", None) is not None:
        wide = full(attn.gate.in_features)
        gate = Layer(name=f"{name}.gate", branch=name, out=inner, inp=wide)
        layers = (*layers, *layers_of(attn.gate, gate))
    attention = Attention(
        branch=name, qkv=qkv.name, heads=f"{name}.heads", qk=qk, v=v, context=context
    )
    return sites, layers, attention
