"""Families of which only the MLPs can be cut; their attentions and convolutions stay unchanged.

The sites are those of `vitrim.network.mlp`, by the module path of each MLP. The layers that read an
MLP's output do not matter: hidden units are between two layers of the MLP. These families have no
branches to drop and no described residual stream.
"""

from __future__ import annotations

from timm.models.byobnet import ByobNet
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.convnext import ConvNeXt
from timm.models.crossvit import CrossVit
from timm.models.davit import DaVit
from timm.models.edgenext import EdgeNeXt
from timm.models.focalnet import FocalNet
from timm.models.gcvit import GlobalContextVit
from timm.models.hiera import Hiera
from timm.models.levit import Levit, LevitDistilled
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit
from timm.models.nest import Nest
from timm.models.pit import PoolingVisionTransformer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.tnt import TNT
from timm.models.twins import Twins
from timm.models.vision_transformer_sam import VisionTransformerSAM
from timm.models.volo import VOLO
from timm.models.xcit import Xcit
from torch import nn

from vitrim.network.dispatch import UnsupportedArchitecture, structure
from vitrim.network.mlp import SUPPORTED, is_mlp, mlp_of
from vitrim.network.structure import Structure, joined


@structure.register(ByobNet)
@structure.register(Cait)
@structure.register(ConVit)
@structure.register(ConvNeXt)
@structure.register(CrossVit)
@structure.register(DaVit)
@structure.register(EdgeNeXt)
@structure.register(FocalNet)
@structure.register(GlobalContextVit)
@structure.register(Hiera)
@structure.register(Levit)
@structure.register(LevitDistilled)
@structure.register(MlpMixer)
@structure.register(MultiScaleVit)
@structure.register(Nest)
@structure.register(PoolingVisionTransformer)
@structure.register(PyramidVisionTransformerV2)
@structure.register(TNT)
@structure.register(Twins)
@structure.register(VOLO)
@structure.register(VisionTransformerSAM)
@structure.register(Xcit)
def _(net: nn.Module) -> Structure:
    mlps = [mlp_of(name, module) for name, module in net.named_modules() if is_mlp(module)]
    described = joined(mlps)
    if all(site.locked_reason for site in described.sites.values()):
        raise UnsupportedArchitecture(
            f"{type(net).__name__} has no MLP that can be cut; supported MLPs: {SUPPORTED}"
        )
    return described
