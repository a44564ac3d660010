"""The plain vision transformer family: ViT, DeiT, DeiT3, DINOv2, CLIP and SigLIP towers of timm.

Sites of block i (D embed, H heads, K head dim, M mlp hidden):
    blocks.i.attn.input   (D,)    columns of qkv      the norm's output, gathered
    blocks.i.attn.heads   (H,)    whole heads
    blocks.i.attn.qk      (H*K,)  query and key rows, free in every head
    blocks.i.attn.v       (H*K,)  value rows and proj columns, free in every head
    blocks.i.mlp.input    (D,)    columns of fc1      the norm's output, gathered
    blocks.i.mlp.hidden   (M,)    rows of fc1 and columns of fc2

Annotations are evaluated here, because TorchScript reads no strings.
"""

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


class AttentionBranch(nn.Module):
    """A pre-norm block without its MLP; the names of its modules are timm's."""

    branch = "attn"

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        parts = dict(block.named_children())
        self.norm1, self.attn = parts["norm1"], parts["attn"]
        self.ls1, self.drop_path1 = parts["ls1"], parts["drop_path1"]
        self.training = block.training

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map (B, N, D) to the same shape; `attn_mask` and `is_causal` as in timm."""
        if attn_mask is None and not is_causal:
            output: Tensor = self.attn(self.norm1(x))
        else:
            output = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        output = x + self.drop_path1(self.ls1(output))
        return output


class MlpBranch(nn.Module):
    """A pre-norm block without its attention; the names of its modules are timm's."""

    branch = "mlp"

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        parts = dict(block.named_children())
        self.norm2, self.mlp = parts["norm2"], parts["mlp"]
        no_scale = nn.Identity().train(block.training)  # not every family has layer scales
        self.ls2 = parts.get("ls2", no_scale)
        self.drop_path2 = parts["drop_path2"]
        self.training = block.training

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map (..., D) to the same shape; attention masks do not matter here."""
        output: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return output


class NoBranch(nn.Identity):
    """What is left of a block without both of its branches."""

    def forward(
        self, input: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the input; attention masks do not matter here."""
        return input


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
    remaining: nn.Module = NoBranch().train(block.training)
    if others:
        remaining = AttentionBranch(block) if others == ["attn"] else MlpBranch(block)
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
        if isinstance(block, NoBranch):
            continue
        if isinstance(block, AttentionBranch | MlpBranch):
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
