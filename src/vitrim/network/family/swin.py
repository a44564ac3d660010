"""The Swin transformers of timm: `SwinTransformer`, whose attention is within (shifted) windows.

Sites of block j of stage i (D the stage's width, H heads, K head dim, M mlp hidden):
    layers.i.blocks.j.attn.input   (D,)    columns of qkv      the norm's output, gathered
    layers.i.blocks.j.attn.heads   (H,)    whole heads, their columns of the position bias included
    layers.i.blocks.j.attn.qk      (H*K,)  query and key rows, free in every head
    layers.i.blocks.j.attn.v       (H*K,)  value rows and proj columns, free in every head
    layers.i.blocks.j.mlp.input    (D,)    columns of fc1      the norm's output, gathered
    layers.i.blocks.j.mlp.hidden   (M,)    rows of fc1 and columns of fc2

Attention works on windows of tokens; the last window of a row or column is padded with zeros. The
Linears of attentions are applied to the padding as well, and counted there. Patch merging is never
cut. Annotations are evaluated here, because TorchScript reads no strings.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    get_relative_position_index,
    window_reverse,
)
from torch import Tensor, nn

from vitrim.network.attention import SlicedWindowAttention
from vitrim.network.dispatch import (
    UnsupportedArchitecture,
    drop_branch,
    non_persistent_buffers,
    stream,
    structure,
)
from vitrim.network.family.vit import NUMBERS, MlpBranch, NoBranch
from vitrim.network.heads import attention_of
from vitrim.network.mlp import mlp_of
from vitrim.network.stream import BranchStep, MergeStep, Stream
from vitrim.network.structure import ResidualBranch, Structure, joined

_COPIED = (
    "input_resolution",
    "target_shift_size",
    "always_partition",
    "dynamic_mask",
    "window_size",
    "shift_size",
    "window_area",
)


class WindowBlock(SwinTransformerBlock):  # type: ignore[misc]
    """A block without its MLP, with timm's windows, shift and mask."""

    def __init__(self, block: SwinTransformerBlock) -> None:
        nn.Module.__init__(self)
        for name in _COPIED:
            setattr(self, name, getattr(block, name))
        self.norm1, self.attn, self.drop_path1 = block.norm1, block.attn, block.drop_path1
        self.register_buffer("attn_mask", block.attn_mask, persistent=False)
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to the same shape."""
        output: Tensor = x + self.drop_path1(self._attn(self.norm1(x)))
        return output


class WindowlessBlock(MlpBranch):
    """A block without its attention, which has no windows."""

    def set_input_size(self, *_: object, **__: object) -> None:
        """Accept the windows that timm sets for an input size."""


class WindowlessNoBranch(NoBranch):
    """What is left of a block without both of its branches, which has no windows."""

    def set_input_size(self, *_: object, **__: object) -> None:
        """Accept the windows that timm sets for an input size."""


class _Part(NamedTuple):
    """A branch that is not dropped: the path of its block, the block, and attn or mlp."""

    path: str
    block: SwinTransformerBlock
    kind: str

    @property
    def name(self) -> str:
        return f"{self.path}.{self.kind}"

    @property
    def norm(self) -> str:
        return f"{self.path}.norm{NUMBERS[self.kind]}"


@structure.register
def _(net: SwinTransformer) -> Structure:
    parts = [part for stage in range(len(net.layers)) for part in _parts(net, stage)]
    described = [
        (_attention if part.kind == "attn" else mlp_of)(part.name, net.get_submodule(part.name))
        for part in parts
    ]
    return replace(
        joined(described),
        branches=tuple(
            ResidualBranch(
                name=part.name,
                block=part.path,
                modules=(part.norm, part.name),
                ends=(f"{part.name}.{'proj' if part.kind == 'attn' else 'fc2'}",),
            )
            for part in parts
        ),
    )


def _attention(name: str, attn: WindowAttention) -> Structure:
    per_head = {"relative_position_bias_table": 1}
    return attention_of(name, attn, per_head=per_head, context=attn.window_area)


@drop_branch.register
def _(net: SwinTransformer, branch: str) -> None:
    path, _, kind = branch.rpartition(".")
    block = net.get_submodule(path)
    remaining: nn.Module
    if not isinstance(block, SwinTransformerBlock) or isinstance(block, WindowBlock):
        remaining = WindowlessNoBranch().train(block.training)
    else:
        remaining = WindowBlock(block) if kind == "mlp" else WindowlessBlock(block)
    net.set_submodule(path, remaining)


@stream.register
def _(net: SwinTransformer) -> Stream:
    steps: list[BranchStep | MergeStep] = []
    for index, stage in enumerate(net.layers):
        if not isinstance(stage.downsample, nn.Identity):
            steps.append(MergeStep(reader=f"layers.{index}.downsample", apply=stage.downsample))
        steps += [_branch(part) for part in _parts(net, index)]
    return Stream(
        embed=net.patch_embed,
        steps=tuple(steps),
        final_norm="norm",
        n_prefix_tokens=0,
        n_readout_tokens=0,
        norm_is_features=True,
    )


@non_persistent_buffers.register
def _(net: SwinTransformer) -> dict[str, Tensor]:
    buffers: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, _ATTENTIONS):
            index = get_relative_position_index(*module.window_size)
            buffers[f"{name}.relative_position_index"] = index
        elif isinstance(module, SwinTransformerBlock) and module.attn_mask is not None:
            mask = module.get_attn_mask()
            buffers[f"{name}.attn_mask"] = mask.to(module.norm1.weight.dtype)
    return buffers


_ATTENTIONS = (WindowAttention, SlicedWindowAttention)


def _parts(net: SwinTransformer, stage: int) -> Iterator[_Part]:
    """Iterate over the branches of a stage that are not dropped.

    Raises:
        UnsupportedArchitecture: a block or its attention is of another class than timm's.
    """
    for index, block in enumerate(net.layers[stage].blocks):
        path = f"layers.{stage}.blocks.{index}"
        if isinstance(block, NoBranch):
            continue
        if isinstance(block, MlpBranch):
            yield _Part(path, block, block.branch)
            continue
        if type(block) not in (SwinTransformerBlock, WindowBlock) or not isinstance(
            block.attn, _ATTENTIONS
        ):
            raise UnsupportedArchitecture(
                f"{type(net).__name__} with {type(block).__name__} and "
                f"{type(getattr(block, 'attn', None)).__name__} cannot be cut; "
                "supported: SwinTransformerBlock with WindowAttention and Mlp"
            )
        yield _Part(path, block, "attn")
        if type(block) is SwinTransformerBlock:
            yield _Part(path, block, "mlp")


def _branch(part: _Part) -> BranchStep:
    block = part.block
    norm = block.get_submodule(f"norm{NUMBERS[part.kind]}")
    inner = block.get_submodule("mlp") if part.kind == "mlp" else block._attn
    return BranchStep(
        name=part.name,
        reader=part.norm,
        apply=lambda x: inner(norm(x)),
        scale=None,
        tokens=(lambda x: x.flatten(1, -2))
        if part.kind == "mlp"
        else (lambda windows: _to_tokens(block, windows)),
    )


def _to_tokens(block: SwinTransformerBlock, windows: Tensor) -> Tensor:
    """Map activations in windows, (B * windows, area, C), to the order of tokens, (B, H*W, C).

    Padding is removed. The size of the map is the one that the network was built for.
    """
    (height, width), (h, w) = block.input_resolution, block.window_size
    padded = height + -height % h, width + -width % w
    rolled = window_reverse(windows.contiguous(), (h, w), *padded)[:, :height, :width]
    tokens: Tensor = rolled.roll(block.shift_size, dims=(1, 2)).flatten(1, 2)
    return tokens
