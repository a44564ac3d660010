"""The residual stream of timm's `ConvNeXt`, computed channels last.

A branch is all that a block adds, named after its MLP: a depthwise convolution, a norm and the MLP,
which is applied to every place by itself. The MLPs' sites are those of
`vitrim.network.family.mlp_only`.
"""

from collections.abc import Callable

from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from vitrim.network.dispatch import UnsupportedArchitecture, stepwise
from vitrim.network.stream import BranchStep, MergeStep, Stream

_Map = Callable[[Tensor], Tensor]


@stepwise.register
def _(net: ConvNeXt) -> Stream:
    steps: list[BranchStep | MergeStep] = []
    for index, stage in enumerate(net.stages):
        if not isinstance(stage.downsample, nn.Identity):
            path = f"stages.{index}.downsample"
            steps.append(MergeStep(reader=path, apply=_channels_last(stage.downsample)))
        steps += [
            _branch(f"stages.{index}.blocks.{number}", block)
            for number, block in stage.blocks.named_children()
        ]
    return Stream(
        embed=lambda images: _last(net.stem(images)),
        steps=tuple(steps),
        final_norm="norm_pre",
        final_input=_first,
        n_prefix_tokens=0,
        n_readout_tokens=0,
        norm_is_features=True,
    )


def _branch(path: str, block: ConvNeXtBlock) -> BranchStep:
    if block.use_conv_mlp or not isinstance(block.shortcut, nn.Identity):
        raise UnsupportedArchitecture(
            f"ConvNeXt with convolutions as MLPs, or without a plain shortcut ({path}), has no "
            "residual stream of places"
        )

    def apply(x: Tensor) -> Tensor:
        added: Tensor = block.mlp(block.norm(_last(block.conv_dw(_first(x)))))
        return added if block.gamma is None else added * block.gamma

    return BranchStep(
        name=f"{path}.mlp",
        reader=f"{path}.conv_dw",
        apply=apply,
        scale=block.gamma,
        tokens=lambda x: x.flatten(1, -2),
        pointwise=f"{path}.mlp",
    )


def _channels_last(module: nn.Module) -> _Map:
    return lambda x: _last(module(_first(x)))


def _first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)
