"""Checkpoints of dense networks: loaded as timm loads them, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vitrim
from command import QUICK, Command
from families import FAMILIES
from nets import MODEL, TINY, randomise, small_net
from sources import source
from vitrim import Plan, save
from vitrim.errors import ConfigError
from vitrim.model.source import Timm

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")  # of timm, when it resizes
    for message in ("torch.searchsorted", "Using a non-tuple sequence")
]
VIT = {"embed_dim": 24, "num_heads": 3, "depth": 1, "num_classes": 7}
TNT = {
    "img_size": 32,
    "embed_dim": 24,
    "inner_dim": 8,
    "depth": 1,
    "num_heads_inner": 2,
    "num_heads_outer": 3,
    "num_classes": 7,
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {**VIT, "img_size": 32}),
    "vit, hybrid": ("vit_tiny_r_s16_p8_224", {**VIT, "img_size": 64}),
    "deit3": ("deit3_small_patch16_224", {**VIT, "img_size": 32}),
    "flexivit": ("flexivit_small", {**VIT, "img_size": 64}),
    "siglip": ("vit_base_patch16_siglip_gap_224", {**VIT, "img_size": 32}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 12,
            "depths": [2, 2],
            "num_heads": [2, 3],
            "num_classes": 7,
        },
    ),
    "tnt": ("tnt_s_patch16_224", TNT),
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "num_classes": 7}),
    "crossvit": ("crossvit_tiny_240", {"num_classes": 7}),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64, "num_classes": 7}),
}
CASES = OTHERS | {family: case[:2] for family, case in FAMILIES.items()}


def model_of(name: str, args: dict[str, Any], file: Path) -> Timm:
    further = {key: value for key, value in args.items() if key != "img_size"}
    return source(
        name=name,
        args=further,
        num_classes=None,
        image_size=args.get("img_size"),
        checkpoint=str(file),
    )


def file_of(name: str, args: dict[str, Any], folder: Path) -> Path:
    """Write a random network in timm's format."""
    net = timm.create_model(name, **args)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.ndim else tensor
        for key, tensor in net.state_dict().items()
    }
    save_file(state, folder / "net.safetensors")
    return folder / "net.safetensors"


def loaded_by_timm(name: str, args: dict[str, Any], file: Path) -> nn.Module:
    overlay = {"file": str(file), "num_classes": args.get("num_classes", 1000)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args)


@pytest.mark.parametrize("side", ["the same size", "another size"])
@pytest.mark.parametrize("family", CASES)
def test_a_checkpoint_is_loaded_as_timm_loads_it(family: str, side: str, tmp_path: Path) -> None:
    name, args = CASES[family]
    file = file_of(name, args, tmp_path)
    if side == "another size":
        if "img_size" not in args:
            pytest.skip("the size of the images is no argument of this network")
        args = {**args, "img_size": 2 * args["img_size"]}
    try:
        expected = loaded_by_timm(name, args, file).state_dict()
    except RuntimeError:
        with pytest.raises(ConfigError, match="does not fit this model"):
            model_of(name, args, file).build()
        return
    state = model_of(name, args, file).build().state_dict()
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []


def test_channels_are_converted_as_timm_does(tmp_path: Path) -> None:
    name, args = OTHERS["vit"]
    file = file_of(name, args, tmp_path)
    grey = {**args, "in_chans": 1}
    expected = loaded_by_timm(name, grey, file).state_dict()
    state = model_of(name, grey, file).build().state_dict()
    assert torch.equal(state["patch_embed.proj.weight"], expected["patch_embed.proj.weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(prefix: str, tmp_path: Path) -> None:
    net = small_net(num_classes=5, dtype=torch.float32)
    save_file({prefix + k: v for k, v in net.state_dict().items()}, tmp_path / "net.safetensors")
    built = source(checkpoint=str(tmp_path / "net.safetensors")).build()
    assert torch.equal(built.head.weight, net.head.weight)


def test_a_network_that_vitrim_saved_at_another_shape_is_loaded_unchanged(tmp_path: Path) -> None:
    """Its number of tokens is that of timm's size, which would be taken for its shape."""
    args = {**VIT, "img_size": [112, 448]}
    net = randomise(timm.create_model(MODEL["name"], **args))
    save(tmp_path, net, Plan(model={"name": MODEL["name"], "args": args}, edits=()))
    built = model_of(MODEL["name"], args, tmp_path).build()
    assert torch.equal(built.pos_embed, net.pos_embed)


def halves(name: str, tensor: Tensor) -> Tensor:
    return tensor.half() if name.endswith("weight") else tensor


TYPES: dict[str, Callable[[str, Tensor], Tensor]] = {
    "float16": lambda _, tensor: tensor.half(),
    "bfloat16": lambda _, tensor: tensor.bfloat16(),
    "float64": lambda _, tensor: tensor.double(),
    "float16, float32": halves,
}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return small_net(num_classes=5, dtype=torch.float32)


@pytest.mark.parametrize("dtypes", TYPES)
def test_weights_of_any_type_are_taken_in_float32(
    net: nn.Module, dtypes: str, tmp_path: Path
) -> None:
    file = tmp_path / "net.safetensors"
    state = {name: TYPES[dtypes](name, tensor) for name, tensor in net.state_dict().items()}
    save_file(state, file)
    built = source(checkpoint=str(file)).build()
    assert {tensor.dtype for tensor in built.parameters()} == {torch.float32}
    assert all(torch.equal(built.state_dict()[name], state[name].float()) for name in state)


def test_a_run_from_half_precision_says_so(command: Command, tmp_path: Path) -> None:
    args = {key: TINY[key] for key in TINY if key not in ("num_classes", "img_size")}
    half = small_net(num_classes=10, dtype=torch.float16)
    save_file(half.state_dict(), tmp_path / "net.safetensors")
    words = (
        "model=timm",
        f"model.name={MODEL['name']}",
        *(f"+model.args.{key}={value}" for key, value in args.items()),
        "model.num_classes=10",
        "model.image_size=32",
        f"model.checkpoint={tmp_path / 'net.safetensors'}",
        "data=none",
        *QUICK,
    )
    done = command(*words, "method=aiminify", "target.params=0.9")
    assert done.code == 0, done.message
    assert json.loads(done.report.read_text())["checkpoint_dtype"] == "float16"
    folder, plan = tmp_path / "half", vitrim.load(done.report.parent)[1]
    save(folder, vitrim.load(done.report.parent)[0].half(), plan)
    again = command(*words, "method=aiminify", "target.params=0.87", f"from_run={folder}")
    assert again.code == 0, again.message


def test_a_run_folder_may_have_any_name(net: nn.Module, tmp_path: Path) -> None:
    folder = save(
        tmp_path / "best.ckpt",
        net,
        Plan(model=MODEL | {"args": TINY | {"num_classes": 5}}, edits=()),
    )
    assert torch.equal(source(checkpoint=str(folder)).build().head.weight, net.head.weight)
