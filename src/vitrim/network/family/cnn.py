"""Convolutional networks of residual blocks: timm's ResNet and MobileNetV2.

A site is the channels between two convolutions of a block, named after the first of them (a block
may have two sites):
    layer1.0.conv1.channels      BasicBlock and Bottleneck: rows of conv1, columns of conv2
    layer1.0.conv2.channels      Bottleneck: rows of conv2, columns of conv3
    blocks.1.0.conv_pw.channels  InvertedResidual: rows of conv_pw and conv_dw, columns of conv_pwl
BatchNorms in between are cut in the same way. The inputs and outputs of blocks keep their width.

A branch is a whole block that adds to its own input: in ResNet a block without downsample, in
MobileNetV2 a block with a skip. The ReLU after the sum changes nothing once the branch adds
nothing, because the input has already passed a ReLU. With other activations ResNet has no branches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from timm.layers import DropPath
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from vitrim.network.dispatch import UnsupportedArchitecture, drop_branch, structure
from vitrim.network.structure import Dim, Layer, Part, ResidualBranch, Site, Structure, full, joined

_CHAINS = {
    BasicBlock: (("conv1", "bn1"), ("conv2", "bn2")),
    Bottleneck: (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    DepthwiseSeparableConv: (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    InvertedResidual: (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}
"""The convolutions of each class of blocks and the norm after each, in order."""


@structure.register
def _(net: ResNet) -> Structure:
    stages = {name: stage for name, stage in net.named_children() if name.startswith("layer")}
    blocks = dict(_blocks(net, stages, (BasicBlock, Bottleneck)))
    acts = {type(m) for path, m in net.named_modules() if path.split(".")[-1].startswith("act")}
    without_downsample = [name for name, block in blocks.items() if block.downsample is None]
    return _structure(blocks, without_downsample if acts <= {nn.ReLU, nn.ReLU6} else ())


@structure.register
def _(net: EfficientNet) -> Structure:
    stages = {f"blocks.{index}": stage for index, stage in enumerate(net.blocks)}
    blocks = dict(_blocks(net, stages, (DepthwiseSeparableConv, InvertedResidual)))
    described = _structure(blocks, [name for name, block in blocks.items() if block.has_skip])
    if not described.sites and not described.branches and len(blocks) == len([*_all(net.blocks)]):
        raise UnsupportedArchitecture(
            f"{type(net).__name__} of DepthwiseSeparableConv alone cannot be cut: every channel is "
            "one of a block's output; supported: InvertedResidual"
        )
    return described


def _all(stages: nn.Module) -> Iterator[nn.Module]:
    """Iterate over all blocks, those that are dropped included."""
    for stage in stages.children():
        yield from stage.children()


@drop_branch.register(ResNet)
@drop_branch.register(EfficientNet)
def _(net: nn.Module, branch: str) -> None:
    net.set_submodule(branch, nn.Identity().train(net.get_submodule(branch).training))


def _blocks(
    net: nn.Module, stages: Mapping[str, nn.Module], kinds: tuple[type, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the blocks that are not dropped, with their module paths."""
    for stage, blocks in stages.items():
        for index, block in blocks.named_children():
            if type(block) is nn.Identity:
                continue  # dropped
            known = type(block) in kinds
            unsupported = _unsupported_module(block) if known else type(block).__name__
            if unsupported:
                names = " and ".join(kind.__name__ for kind in kinds)
                raise UnsupportedArchitecture(
                    f"{type(net).__name__} with {unsupported} at {stage}.{index} cannot be cut; "
                    f"supported: {names} of BatchNorm2d and Conv2d, in one group or depthwise"
                )
            yield f"{stage}.{index}", block


def _unsupported_module(block: nn.Module) -> str:
    """Return the class and name of a module that does not belong to a known block, or nothing."""
    chain = dict(_CHAINS[type(block)])
    for name, module in block.named_children():
        match module:
            case nn.Conv2d() if name in chain:
                known = module.groups == (module.in_channels if name == "conv_dw" else 1)
            case nn.BatchNorm2d():
                known = name in chain.values() and module.affine
            case _:
                known = name.startswith(("act", "downsample")) or isinstance(
                    module, (nn.Identity, DropPath)
                )
        if not known:
            return f"{type(module).__name__} as {name}"
    return ""


def _structure(blocks: Mapping[str, nn.Module], residual: Collection[str]) -> Structure:
    """Return the structure of `blocks`; those named in `residual` can be dropped."""
    return replace(
        joined([_chain(name, block) for name, block in blocks.items()]),
        branches=tuple(
            ResidualBranch(
                name=name,
                block=name,
                modules=(name,),
                ends=(f"{name}.{_CHAINS[type(blocks[name])][-1][1]}",),
            )
            for name in residual
        ),
    )


def _chain(name: str, block: nn.Module) -> Structure:
    """Return the structure of one block: each convolution reads the channels of the one before."""
    sites: dict[str, Site] = {}
    layers: list[Layer] = []
    chain = _CHAINS[type(block)]
    channels: Dim = ()
    for path, norm in chain:
        conv = block.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        channels = channels or full(conv.in_channels)
        columns: Dim = () if path == "conv_dw" else channels
        if columns and path != chain[-1][0]:
            size = conv.out_channels
            site = Site(name=f"{name}.{path}.channels", kind="channels", size=size)
            sites[site.name] = site
            channels = (Part(site=site.name, offset=0, size=site.size),)
        elif columns:
            channels = full(conv.out_channels)
        for module, inp, kind in ((path, columns, "convolution"), (norm, (), "norm")):
            layers.append(
                Layer(
                    name=f"{name}.{module}",
                    branch=name,
                    out=channels,
                    inp=inp,
                    locked_reason=f"it is a {kind}, and only Linears can be factorised",
                )
            )
    return Structure(sites=sites, layers=tuple(layers))
