"""Convolutional networks of residual blocks: timm's ResNet and MobileNetV2.

A site is the channels between two convolutions of a block, named after the module that makes them
as `attn.heads` is after the attention: a block may have two such sites, and they differ in that.
    layer1.0.conv1.channels      BasicBlock and Bottleneck: rows of conv1, columns of conv2
    layer1.0.conv2.channels      Bottleneck: rows of conv2, columns of conv3
    blocks.1.0.conv_pw.channels  InvertedResidual: rows of conv_pw and conv_dw, columns of conv_pwl
BatchNorms in between are cut alike. What blocks hand on to each other keeps its width.

A branch is a whole block that adds to its own input: in ResNet one without a downsample, in
MobileNetV2 one with a skip. ReLU after the sum changes nothing once the branch adds nothing: the
input went through a ReLU, too. With other activations ResNet has no branches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from timm.layers import DropPath
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from vitrim.network.dispatch import UnsupportedArchitecture, drop, structure
from vitrim.network.structure import Dim, Layer, Part, Residual, Site, Structure, full, joined

_CHAINS = {
    BasicBlock: (("conv1", "bn1"), ("conv2", "bn2")),
    Bottleneck: (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    DepthwiseSeparableConv: (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    InvertedResidual: (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}
"""Convolutions of each kind of block, and the norm after each, in their order."""


@structure.register
def _(net: ResNet) -> Structure:
    stages = {name: stage for name, stage in net.named_children() if name.startswith("layer")}
    blocks = dict(_blocks(net, stages, (BasicBlock, Bottleneck)))
    acts = {type(m) for path, m in net.named_modules() if path.split(".")[-1].startswith("act")}
    whole = [name for name, block in blocks.items() if block.downsample is None]
    return _structure(blocks, whole if acts <= {nn.ReLU, nn.ReLU6} else ())


@structure.register
def _(net: EfficientNet) -> Structure:
    stages = {f"blocks.{index}": stage for index, stage in enumerate(net.blocks)}
    blocks = dict(_blocks(net, stages, (DepthwiseSeparableConv, InvertedResidual)))
    return _structure(blocks, [name for name, block in blocks.items() if block.has_skip])


@drop.register(ResNet)
@drop.register(EfficientNet)
def _(net: nn.Module, branch: str) -> None:
    net.set_submodule(branch, nn.Identity().train(net.get_submodule(branch).training))


def _blocks(
    net: nn.Module, stages: Mapping[str, nn.Module], kinds: tuple[type, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the blocks that are there, with their module paths."""
    for stage, blocks in stages.items():
        for index, block in blocks.named_children():
            if type(block) is nn.Identity:
                continue  # dropped
            strange = _strange(block) if type(block) in kinds else type(block).__name__
            if strange:
                names = " and ".join(kind.__name__ for kind in kinds)
                raise UnsupportedArchitecture(
                    f"{type(net).__name__} with {strange} at {stage}.{index} cannot be cut; "
                    f"supported: {names} of BatchNorm2d and Conv2d, in one group or depthwise"
                )
            yield f"{stage}.{index}", block


def _strange(block: nn.Module) -> str:
    """Return the class of what a block has beside its chain, or else than expected; or nothing."""
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


def _structure(blocks: Mapping[str, nn.Module], whole: Collection[str]) -> Structure:
    """Return the structure of `blocks`, of which those named in `whole` can be dropped."""
    return replace(
        joined([_chain(name, block) for name, block in blocks.items()]),
        branches=tuple(
            Residual(
                name=name,
                block=name,
                modules=(name,),
                ends=(f"{name}.{_CHAINS[type(blocks[name])][-1][1]}",),
            )
            for name in whole
        ),
    )


def _chain(name: str, block: nn.Module) -> Structure:
    """Return the structure of one block: each convolution reads what the one before made."""
    sites: dict[str, Site] = {}
    layers: list[Layer] = []
    chain = _CHAINS[type(block)]
    flows: Dim = ()
    for path, norm in chain:
        conv = block.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        flows = flows or full(conv.in_channels)
        columns: Dim = () if path == "conv_dw" else flows
        if columns and path != chain[-1][0]:
            site = Site(name=f"{name}.{path}.channels", size=conv.out_channels)
            sites[site.name] = site
            flows = (Part(site=site.name, offset=0, size=site.size),)
        elif columns:
            flows = full(conv.out_channels)
        for at, inp, kind in ((path, columns, "convolution"), (norm, (), "norm")):
            layers.append(
                Layer(
                    name=f"{name}.{at}",
                    branch=name,
                    out=flows,
                    inp=inp,
                    locked=f"it is a {kind}, and factors are made of Linears only",
                )
            )
    return Structure(sites=sites, layers=tuple(layers))
