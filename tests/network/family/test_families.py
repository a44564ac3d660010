"""Families besides ViT, Swin and the convolutional ones: every cut of each is exact."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import vitrim.store
from command import QUICK, Command
from families import ATTENTIONS, FAMILIES, VIT
from matrix import NETWORKS, Case, Loader
from nets import images, outputs, plan_of, plans, randomise, relative_error
from vitrim import LowRank, Plan, combine, count, cut, load, masked, save
from vitrim.budget.cost import Cost
from vitrim.network import UnsupportedArchitecture, branches, sites, stream, structure
from vitrim.network.skeleton import on_meta
from vitrim.plan import PlanError
from vitrim.trainer.activations import capture


def of(*families: str) -> pytest.MarkDecorator:
    """Run a test with those of `families` that the installed timm has."""
    return pytest.mark.parametrize("family", [name for name in families if name in FAMILIES])


each = of(*FAMILIES)


@cache
def net_of(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    name, args, _ = FAMILIES[family]
    return randomise(timm.create_model(name, pretrained=False, **args).to(dtype))


def side_of(family: str) -> int:
    return int(FAMILIES[family][1].get("img_size", 64))


def model_of(family: str) -> dict[str, Any]:
    name, args, _ = FAMILIES[family]
    return {"name": name, "args": args}


def half(family: str) -> Plan:
    """Keep a random half of the units of every site; of attentions, all dims of one head."""
    generator = torch.Generator().manual_seed(3)
    kept = {}
    for name, site in sites(net_of(family)).items():
        index = torch.randperm(site.size, generator=generator)[: max(1, site.size // 2)].tolist()
        first = site.head_dims[0] if site.head_dims else 0
        kept[name] = sorted({*index, *range(first)} | ({0} if name.endswith("heads") else set()))
    return plan_of(kept, model_of(family))


@each
def test_half_of_every_site_is_cut_and_counted_exactly(family: str) -> None:
    net, plan, x = net_of(family), half(family), images(side_of(family))
    kinds = FAMILIES[family][2]
    assert tuple(dict.fromkeys(".".join(site.split(".")[-2:]) for site in sites(net))) == kinds
    small = cut(net, plan)
    actual = outputs(small, x)
    assert relative_error(actual, outputs(masked(net, plan), x)) <= 1e-12
    assert relative_error(actual, outputs(net, x)) > 1e-3
    sizes = count(small, side_of(family))
    assert Cost(net, side_of(family)).plan(plan)[:2] == sizes[:2]
    assert sizes.params == sum(tensor.numel() for tensor in small.parameters())
    assert Cost(small, side_of(family)).dense_count == sizes


@each
def test_what_is_cut_is_saved_and_loaded_to_the_bit(family: str, tmp_path: Path) -> None:
    plan, x = half(family), images(side_of(family), dtype=torch.float32)
    small = cut(net_of(family, torch.float32), plan)
    loaded, _ = load(save(tmp_path, small, plan))
    assert torch.equal(outputs(loaded, x), outputs(small, x))


@of("beit", "eva", "levit", "swin v2")
def test_buffers_that_no_module_can_fill_are_rebuilt(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, x = half(family), images(side_of(family))
    small = cut(net_of(family), plan)
    monkeypatch.setattr(vitrim.store, "non_persistent_buffers", lambda net: {})
    loaded, _ = load(save(tmp_path, small, plan))
    assert torch.equal(outputs(loaded, x), outputs(small, x))


@of("beit", "dinov3", "swin v2")
def test_doubles_are_loaded_to_the_bit(family: str, tmp_path: Path) -> None:
    plan, x = half(family), images(side_of(family))
    small = cut(net_of(family), plan)
    loaded, _ = load(save(tmp_path, small, plan))
    assert torch.equal(outputs(loaded, x), outputs(small, x))


@of("beit", "eva-02, q, k and v apart", "dinov3", "swin v2")
@settings(max_examples=6)
@given(data=st.data())
def test_any_plan_is_cut_and_counted_exactly_in_two_steps_too(
    family: str, data: st.DataObject
) -> None:
    net, x = net_of(family), images(side_of(family))
    first = data.draw(plans(sites(net), model_of(family)))
    small = cut(net, first)
    actual = outputs(small, x)
    assert relative_error(actual, outputs(masked(net, first), x)) <= 1e-12
    cost = Cost(net, side_of(family))
    assert cost.plan(first)[:2] == count(small, side_of(family))[:2]
    second = data.draw(plans(sites(small), model_of(family)))
    smaller, at_once = cut(small, second), cut(net, combine(net, first, second))
    assert relative_error(outputs(smaller, x), outputs(at_once, x)) <= 1e-12


@of("beit", "eva-02, q, k and v apart", "dinov3", "swin v2")
def test_attentions_agree_without_the_fused_kernel(family: str) -> None:
    small, x = cut(net_of(family), half(family)), images(side_of(family))
    expected = outputs(small, x)
    for module in small.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert relative_error(outputs(small, x), expected) <= 1e-12


@of("beit", "dinov3", "swin v2", "pvt v2")
def test_locked_sites_and_layers_say_why(family: str) -> None:
    described = structure(net_of(family))
    for site in described.sites.values():
        if site.locked_reason:
            with pytest.raises(PlanError, match="cannot be cut exactly"):
                cut(net_of(family), plan_of({site.name: (0,)}))
    for layer in described.layers:
        if layer.locked_reason:
            with pytest.raises(PlanError, match="cannot be factorised"):
                cut(net_of(family), Plan(model={}, edits=(LowRank(linear=layer.name, rank=1),)))


@of("dinov3", "levit")
def test_layers_are_factorised_exactly(family: str) -> None:
    net, x = net_of(family), images(side_of(family))
    ranks = [
        LowRank(linear=layer.name, rank=2)
        for layer in structure(net).layers
        if not layer.locked_reason
    ]
    plan = Plan(model=model_of(family), edits=(*ranks, *half(family).edits))
    small = cut(net, plan)
    assert relative_error(outputs(small, x), outputs(masked(net, plan), x)) <= 1e-10
    assert Cost(net, side_of(family)).plan(plan)[:2] == count(small, side_of(family))[:2]


def every_rank(family: str) -> Plan:
    """Factorise every layer that can be, the pieces of a fused one each by itself."""
    ranks = [
        LowRank(linear=name, rank=2)
        for layer in structure(net_of(family)).layers
        if not layer.locked_reason
        for name in ([f"{layer.name}.{piece}" for piece in layer.pieces] or [layer.name])
    ]
    return Plan(model=model_of(family), edits=tuple(ranks))


@of("beit, no biases, SwiGLU", "dinov3", "swin v2")
def test_low_rank_layers_are_saved_loaded_and_cut_again(family: str, tmp_path: Path) -> None:
    plan, x = every_rank(family), images(side_of(family), dtype=torch.float32)
    small = cut(net_of(family, torch.float32), plan)
    loaded, _ = load(save(tmp_path, small, plan))
    assert torch.equal(outputs(loaded, x), outputs(small, x))
    assert Cost(loaded, side_of(family)).dense_count == count(small, side_of(family))
    second = half(family)
    again = combine(net_of(family, torch.float32), plan, second)
    smaller = cut(loaded, second)
    reloaded, _ = load(save(tmp_path, smaller, again))
    assert torch.equal(outputs(reloaded, x), outputs(smaller, x))


def test_mlps_over_tokens_and_over_channels_are_cut_exactly() -> None:
    mixer = MlpMixer(img_size=32, patch_size=16, num_blocks=2, embed_dim=24, num_classes=7)
    net, x = randomise(mixer.double()), images()
    plan = plan_of({name: range(0, site.size, 2) for name, site in sites(net).items()})
    assert len(plan.edits) == 8
    small = cut(net, plan)
    assert relative_error(outputs(small, x), outputs(masked(net, plan), x)) <= 1e-12
    assert Cost(net, 32).plan(plan)[:2] == count(small, 32)[:2]


def test_units_of_activations_with_parameters_are_not_cut() -> None:
    net = timm.create_model("cait_xxs24_224", **VIT)
    net.blocks[0].mlp.act = nn.PReLU(96)
    assert "blocks.0.mlp.hidden" not in sites(net)
    assert "blocks.1.mlp.hidden" in sites(net)


@pytest.mark.parametrize("name", ["convnextv2_atto", "gmlp_ti16_224"])
def test_a_family_of_other_mlps_is_refused(name: str) -> None:
    with on_meta():
        net = timm.create_model(name)
    with pytest.raises(UnsupportedArchitecture, match="has no MLP that can be cut"):
        structure(net)


def test_where_mlps_alone_are_cut_nothing_is_dropped_or_followed() -> None:
    assert branches(net_of("cait")) == ()
    with pytest.raises(UnsupportedArchitecture, match="no residual stream of tokens"):
        stream(net_of("cait"))


@pytest.mark.parametrize(
    "family", [n for n in FAMILIES if n in ATTENTIONS and n not in ("swin v2", "eva, post-norm")]
)
def test_following_the_stream_is_running_the_network(family: str) -> None:
    net, x = cut(net_of(family), half(family)), images(side_of(family))
    described = stream(net)
    inputs = [*((step.reader, False) for step in described.steps), (described.final_norm, False)]
    with torch.no_grad(), capture(net, inputs) as activations:
        net(x)
        flow = described.embed(x)
        for step in described.steps:
            assert relative_error(activations[step.reader], flow) <= 1e-12
            flow = step.advance(flow)
        assert relative_error(activations[described.final_norm], flow) <= 1e-12


@of("dinov3", "rope, mixed")
def test_the_stream_is_that_of_images_of_any_size(family: str) -> None:
    name, args, _ = FAMILIES[family]
    net = randomise(timm.create_model(name, **{**args, "dynamic_img_size": True}).double())
    x = images()[..., :16]
    described = stream(net)
    with torch.no_grad():
        flow = described.embed(x)
        for step in described.steps:
            flow = step.advance(flow)
        found, expected = net.norm(flow), net.forward_features(x)
    assert relative_error(found, expected) <= 1e-12
    assert Cost(net, (32, 16)).dense_count.macs < Cost(net, 32).dense_count.macs


@of("swin v2", "eva, post-norm")
def test_branches_that_end_in_norms_are_not_followed(family: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"stream of tokens|end in norms"):
        stream(net_of(family))


TINY = ("depth=2", "embed_dim=24", "num_heads=3", "patch_size=2", "in_chans=1")


@of("beit", "dinov3")
def test_units_heads_and_dims_are_ranked_by_images(command: Command, family: str) -> None:
    done = command(
        "model=timm",
        f"model.name={FAMILIES[family][0]}",
        *(f"+model.args.{word}" for word in TINY),
        "model.num_classes=10",
        "model.image_size=8",
        "model.mean=[0.5]",
        "model.std=[0.5]",
        *QUICK,
        "method=oneshot",
        "method.sites=[mlp,heads,v]",
        "method.sampling.images=32",
        "target.macs=0.6",
    )
    assert done.code == 0, done.message
    assert load(done.report.parent)[1].keeps()


CAIT = (
    "model=timm",
    "model.name=cait_xxs24_224",
    *(f"+model.args.{key}={VIT[key]}" for key in ("embed_dim", "num_heads", "depth")),
    "model.num_classes=7",
    "model.image_size=32",
    "data=none",
)


@pytest.mark.parametrize("method", ["aiminify", "vtp", "oneshot"])
def test_methods_that_need_no_stream_run(command: Command, method: str) -> None:
    by_weight = ["method.criterion=magnitude", "method.compensation=none"]
    done = command(*CAIT, f"method={method}", *(by_weight if method == "oneshot" else ()))
    assert done.code == 0, done.message
    net, _ = load(done.report.parent)
    assert sum(p.numel() for p in net.parameters()) > 0


def test_a_method_that_cannot_compress_a_network_names_those_that_can(command: Command) -> None:
    done = command(*CAIT, "method=oneshot")
    assert done.code == 1
    assert "Cait has no residual stream of tokens" in done.message
    able = done.message.rpartition("can compress model.name=cait_xxs24_224: ")[2].split(", ")
    assert {"aiminify", "joint", "vtp"} <= {*able}
    assert not {"oneshot", "dcvit", "mixed_rank"} & {*able}
    assert not (command.out / "phases").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if timm.is_model(name)])
def test_small_networks_of_every_family_go_all_the_way(name: str) -> None:
    with Loader() as loader:
        row = Case(name=name, args=NETWORKS[name]).row(loader, ("masked", "backward", "load"))
    if "refused" not in row:
        assert {row["masked"], row["backward"], row["load"]} == {"ok"}
