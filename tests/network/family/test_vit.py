from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from nets import (
    TINY,
    images,
    outputs,
    plan_of,
    relative_error,
    silenced,
    skeleton_net,
    small_net,
)
from vitrim import Plan, count, cut, load, masked, save
from vitrim.budget.cost import Cost
from vitrim.network import UnsupportedArchitecture, branches, sites
from vitrim.plan import PlanError

SMALL = {**TINY, "embed_dim": 32, "num_heads": 4, "depth": 1}
KINDS = ("attn.input", "attn.heads", "attn.qk", "attn.v", "mlp.input", "mlp.hidden")
WITHOUT_QK = tuple(kind for kind in KINDS if kind != "attn.qk")


class Gated(Attention):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, gated=True, **options)


class Narrow(Attention):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, attn_head_dim=6, **options)


VIT = "vit_tiny_patch16_224"
FAMILIES = {
    "vit": (VIT, {"img_size": 32}, KINDS),
    "vit, two sides": (VIT, {"img_size": (32, 48)}, KINDS),
    "vit, no biases": (VIT, {"img_size": 32, "qkv_bias": False, "proj_bias": False}, KINDS),
    "vit, normalised q and k": (VIT, {"img_size": 32, "qk_norm": True}, WITHOUT_QK),
    "vit, no class token": (
        VIT,
        {"img_size": 32, "class_token": False, "global_pool": "avg"},
        KINDS,
    ),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 32}, KINDS),
    "deit3": ("deit3_small_patch16_224", {"img_size": 32}, KINDS),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 28}, KINDS),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, KINDS),
    "dinov2 giant, GluMlp": ("vit_giant_patch14_dinov2", {"img_size": 28}, KINDS),
    "aimv2, SwiGLU": ("aimv2_large_patch14_224", {"img_size": 28}, KINDS),
    "clip": ("vit_base_patch16_clip_224", {"img_size": 32}, KINDS),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 32}, KINDS),
    "beit3, normalised inside": (
        "beit3_base_patch16_224",
        {"img_size": 32},
        ("attn.input", "attn.qk", "mlp.input"),
    ),
}
family = pytest.mark.parametrize(("name", "args", "kinds"), FAMILIES.values(), ids=FAMILIES)


def half(net: nn.Module) -> Plan:
    """Keep a random half of the units of every site, including the dims of one head."""
    generator = torch.Generator().manual_seed(3)
    kept = {
        name: sorted(torch.randperm(site.size, generator=generator)[: site.size // 2].tolist())
        for name, site in sites(net).items()
    }
    return plan_of(kept)


def picture(net: nn.Module) -> Tensor:
    height, width = net.patch_embed.img_size
    return images(max(height, width))[:, :, :height, :width]


def is_exact(net: nn.Module, plan: Plan) -> bool:
    """Return whether the cut equals both oracles, and differs from the dense network."""
    x = picture(net)
    actual = outputs(cut(net, plan), x)
    errors = [relative_error(actual, outputs(make(net, plan), x)) for make in (masked, silenced)]
    return max(errors) <= 1e-12 and relative_error(actual, outputs(net, x)) > 1e-3


@family
def test_half_of_every_site_is_cut_exactly_and_counted_exactly(
    name: str, args: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    net = small_net(name, **{**SMALL, **args})
    assert tuple(site.removeprefix("blocks.0.") for site in sites(net)) == kinds
    assert is_exact(net, half(net))
    size, small = net.patch_embed.img_size, cut(net, half(net))
    assert Cost(net, size).plan(half(net))[:2] == count(small, size)[:2]
    assert count(small, size).params == sum(t.numel() for t in small.state_dict().values())


@family
def test_each_site_is_cut_exactly_on_its_own(
    name: str, args: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    net = small_net(name, **{**SMALL, **args})
    plan = half(net)
    assert plan.edits
    for edit in plan.edits:
        assert is_exact(net, Plan(model={}, edits=(edit,))), edit.site


@family
def test_the_cut_network_is_saved_and_loaded_to_the_bit(
    tmp_path: Path, name: str, args: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    model = {"name": name, "args": {**SMALL, **args}}
    net = small_net(name, **model["args"])
    plan = Plan(model=model, edits=half(net).edits)
    small = cut(net, plan)
    loaded, _ = load(save(tmp_path, small, plan))
    assert torch.equal(outputs(loaded, picture(net)), outputs(small, picture(net)))


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="timm cannot yet")
@pytest.mark.parametrize("attention", [Gated, Narrow])
def test_attention_with_a_gate_or_narrow_heads_is_cut_exactly(attention: type) -> None:
    net = small_net(attn_layer=attention)
    assert is_exact(net, half(net))
    small = cut(net, half(net))
    assert Cost(net, 32).plan(half(net))[:2] == count(small, 32)[:2]
    attn = small.blocks[0].attn
    if attention is Gated:
        assert attn.gate.out_features == attn.proj.in_features < 24
    else:
        assert attn.proj.in_features < 18


def test_locked_sites_say_why() -> None:
    net = small_net(qk_norm=True)
    with pytest.raises(PlanError, match=r"blocks\.0\.attn\.qk.*normalised"):
        cut(net, plan_of({"blocks.0.attn.qk": (0,)}))
    net = small_net(scale_attn_norm=True, scale_mlp_norm=True)
    for kind in ("attn.heads", "attn.v", "mlp.hidden"):
        with pytest.raises(PlanError, match=rf"blocks\.0\.{kind}.*normalised"):
            cut(net, plan_of({f"blocks.0.{kind}": (0,)}))


def test_every_block_has_its_sites_and_branches_in_order() -> None:
    net = small_net()
    assert list(sites(net)) == [f"blocks.{i}.{kind}" for i in (0, 1) for kind in KINDS]
    assert branches(net) == tuple(f"blocks.{i}.{b}" for i in (0, 1) for b in ("attn", "mlp"))
    sizes = [site.size for site in sites(net).values()]
    assert sizes == 2 * [24, 3, 24, 24, 24, 48]
    widths = {name: site.head_dims for name, site in sites(net).items() if site.head_dims}
    assert widths == {f"blocks.{i}.attn.{s}": (8, 8, 8) for i in (0, 1) for s in ("qk", "v")}


def test_the_sites_of_a_cut_network_have_its_widths() -> None:
    kept = {"blocks.0.attn.qk": (0, 1, 9), "blocks.0.attn.v": (1, 2, 8, 16, 17, 18)}
    remaining = sites(cut(small_net(), plan_of(kept)))
    assert remaining["blocks.0.attn.qk"].head_dims == (2, 1, 0)
    assert remaining["blocks.0.attn.v"].head_dims == (2, 1, 3)
    assert remaining["blocks.0.attn.heads"].size == 3


def test_a_glu_unit_is_one_row_of_each_half() -> None:
    net = small_net("vit_giant_patch14_dinov2", **{**SMALL, "img_size": 28})
    hidden = sites(net)["blocks.0.mlp.hidden"].size
    assert net.blocks[0].mlp.fc1.out_features == 2 * hidden
    small = cut(net, plan_of({"blocks.0.mlp.hidden": (1, hidden - 1)}))
    rows = net.blocks[0].mlp.fc1.weight[[1, hidden - 1, hidden + 1, 2 * hidden - 1]]
    assert torch.equal(small.blocks[0].mlp.fc1.weight, rows)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("tiny_vit_5m_224", "TinyVit"),
        ("swinv2_cr_tiny_224", "SwinTransformerV2Cr"),
        ("vit_pwee_patch16_reg1_gap_256", "ParallelScalingBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ],
)
def test_other_architectures_are_refused_by_their_class(name: str, named: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    net = skeleton_net(name)
    for ask in (sites, branches, lambda net: cut(net, plan_of({})), lambda net: Cost(net, 224)):
        with pytest.raises(UnsupportedArchitecture, match=named):
            ask(net)


def test_the_refusal_names_what_is_supported() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"Linear cannot be cut.*VisionTransformer"):
        sites(nn.Linear(2, 2))
