"""A network at hand: timm's name and arguments of it, and the proof that they are right."""

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vitrim
from nets import images, randomise, small_net
from vitrim.deploy.export import export
from vitrim.errors import ConfigError, VitrimError
from vitrim.model.identify import at_path, cuttable, identify
from vitrim.network.skeleton import dense_skeleton

VIT = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 7}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3]}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        (VIT, {}),
        (VIT, {"num_classes": 0}),
        (VIT, {"in_chans": 1}),
        (VIT, {"in_chans": 4}),
        (VIT, {"img_size": [32, 64]}),
        (VIT, {"act_layer": "relu"}),
        (VIT, {"act_layer": "gelu_tanh"}),
        (VIT, {"global_pool": "avg"}),
        (VIT, {"init_values": 1e-5, "reg_tokens": 4, "qkv_bias": False}),
        (VIT, {"norm_layer": partial(nn.LayerNorm, eps=1e-5)}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "dynamic_img_size": True}),
        ("vit_base_patch16_siglip_224", {"num_classes": 0}),
        ("beit_base_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"img_size": 28}),
    ],
)
def test_name_and_arguments_are_found(name: str, args: dict[str, Any]) -> None:
    net = randomise(timm.create_model(name, **{**SMALL, **args}))
    found = identify(net)
    rebuilt = dense_skeleton(found.model)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == shapes
    size = net.patch_embed.img_size
    image = torch.randn(2, net.patch_embed.proj.in_channels, *size)
    assert torch.equal(found.net(image), net(image))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", SWIN),
        ("convnext_atto", {"num_classes": 3, "in_chans": 1}),
    ],
)
def test_networks_in_stages_are_found(name: str, args: dict[str, Any]) -> None:
    net = randomise(timm.create_model(name, **args))
    found = identify(net)
    assert found.model == {"name": name, "args": found.model["args"]}
    image = torch.randn(1, args.get("in_chans", 3), 32, 32)
    assert torch.equal(found.net(image), net(image))


def test_the_network_at_hand_is_not_changed_and_shares_nothing() -> None:
    net = small_net(dtype=torch.float32).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = identify(net)
    assert net.training
    assert net.blocks[0].training
    with torch.no_grad():
        for parameter in found.net.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_parallel_wrapper_is_taken_off() -> None:
    net = small_net(dtype=torch.float32)
    found = identify(nn.DataParallel(net))
    assert torch.equal(found.net(images(dtype=torch.float32)), net(images(dtype=torch.float32)))


@pytest.mark.slow  # importing the compiler takes seconds
def test_compiled_code_is_taken_off() -> None:
    net = small_net(dtype=torch.float32)
    expected = net(images(dtype=torch.float32))
    assert torch.equal(identify(torch.compile(net)).net(images(dtype=torch.float32)), expected)
    net.blocks[0] = torch.compile(net.blocks[0])
    assert torch.equal(identify(net).net(images(dtype=torch.float32)), expected)
    net.compile()
    assert torch.equal(identify(net).net(images(dtype=torch.float32)), expected)


def test_bf16_becomes_float32() -> None:
    found = identify(small_net(dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert next(found.net.parameters()).dtype == torch.float32


class Twice(timm.models.VisionTransformer):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x)


def with_head(net: nn.Module) -> nn.Module:
    net.head = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 7))
    return net


def with_softmax(net: nn.Module) -> nn.Module:
    net.head = nn.Sequential(nn.Linear(24, 7), nn.Softmax(-1))
    return net


def with_no_linear(net: nn.Module) -> nn.Module:
    net.head = nn.Sequential(nn.LayerNorm(24))
    return net


def with_activation(net: nn.Module) -> nn.Module:
    net.blocks[1].mlp.act = nn.ReLU()
    return net


def with_epsilon(net: nn.Module) -> nn.Module:
    net.norm.eps = 1e-3
    return net


def with_every_layer(net: nn.Module) -> nn.Module:
    layers = {
        "norm": nn.LayerNorm(24, eps=1e-3),
        "fc1": nn.Linear(24, 12, bias=False),
        "bn": nn.BatchNorm1d(12),
        "act": nn.GELU("tanh"),
        "drop": nn.Dropout(0.3),
        "fc2": nn.Linear(12, 5),
    }
    net.head = nn.Sequential(OrderedDict(layers))
    with torch.no_grad():
        net.head.bn.running_mean.uniform_()
    return net.eval()


@pytest.mark.parametrize(("change", "classes"), [(with_head, 7), (with_every_layer, 5)])
def test_a_head_of_ones_own_is_part_of_the_plan(change: Any, classes: int, tmp_path: Path) -> None:
    net = change(small_net(dtype=torch.float32))
    found = identify(net)
    image = images(dtype=torch.float32)
    assert torch.equal(found.net(image), net(image))
    assert found.net.num_classes == classes
    assert [type(layer) for layer in found.net.head] == [type(layer) for layer in net.head]

    plan = vitrim.trim(net, vitrim.score(net, criterion="magnitude"), macs=0.9)
    compact = vitrim.cut(net, plan).eval()
    vitrim.save(tmp_path, compact, plan)
    again = vitrim.load(tmp_path)[0]
    assert torch.equal(again(image), compact(image))
    assert again.head[-1].weight.equal(net.head[-1].weight)
    exported, _ = export(tmp_path, "timm")
    other = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=3).eval()
    assert other(image).shape[1] == 3
    assert other.head[0].weight.equal(net.head[0].weight)


def test_a_head_is_of_known_layers_on_a_network_that_exists() -> None:
    for args in (
        {},
        {"network": "vit_tiny_patch16_224"},
        {"network": "no_such_network", "head": [["0", "Linear", 192, 5, True]]},
        {"network": "vit_tiny_patch16_224", "head": [["0", "Upsample", 5]]},
        {"network": "vit_tiny_patch16_224", "head": [["0", "Linear"]]},
        {"network": "sequential_head", "head": [["0", "Linear", 192, 5, True]]},
    ):
        with pytest.raises(VitrimError, match="sequential_head"):
            dense_skeleton({"name": "sequential_head", "args": args})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            with_softmax,
            r"it has a head of its own \(layer 1 is a Softmax, not one of .*\): take it off",
        ),
        (with_no_linear, r"it has a head of its own \(it has no Linear, .*\): take it off"),
        (with_activation, r"logits of a fixed input differ by .*blocks.1.mlp.act is a ReLU"),
        (with_epsilon, "epsilon of norm is 0.001, timm's network has 1e-06"),
        (lambda net: Twice(**SMALL), "logits of a fixed input differ by .* VisionTransformer"),
        (lambda net: net.to("meta"), "meta device, without weights"),
        (lambda net: nn.Sequential(nn.Flatten(), net), "give its path, backbone='1'"),
        (lambda net: nn.Linear(3, 3), "Linear cannot be cut; supported network classes"),
    ],
)
def test_what_computes_something_else_is_refused(change: Any, message: str) -> None:
    with pytest.raises(VitrimError, match=message):
        identify(change(small_net(dtype=torch.float32)))


def test_a_stated_name_is_proved_too() -> None:
    net = small_net(dtype=torch.float32)
    model = identify(net).model
    assert identify(net, model).model == model
    with pytest.raises(ConfigError, match=r"blocks\.2\.norm1\.weight is missing"):
        identify(net, {"name": VIT, "args": {}})


def test_the_network_inside_is_found_by_its_path() -> None:
    wrapper = nn.Module()
    wrapper.model = small_net(dtype=torch.float32)
    assert cuttable(wrapper) == ["model"]
    assert at_path(wrapper, "model") is wrapper.model
    with pytest.raises(ConfigError, match="has no such module; can be compressed: model"):
        at_path(wrapper, "net")
