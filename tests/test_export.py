"""Exports: every format computes what the network computes, elsewhere too, or writes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from torch import Tensor, nn

from command import Command
from conftest import MODEL, SIZE, images, plan_of, randomise, relative_error
from vitrim import Drop, LowRank, Plan, cut, formats, load, save
from vitrim.export import FILES, main
from vitrim.plan import Keep

SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "args": {
        "img_size": 40,  # filled up to whole windows, half of them shifted
        "window_size": 4,
        "embed_dim": 12,
        "depths": [2],
        "num_heads": [2],
        "mlp_ratio": 2.0,
        "num_classes": 7,
    },
}
RESNET = {
    "name": "resnet18",
    "args": {"layers": [2, 1], "channels": [6, 8], "num_classes": 7, "in_chans": 1},
}
MOBILENET = {"name": "mobilenetv2_035", "args": {"depth_multiplier": 0.1, "num_classes": 7}}
DINOV2 = {
    "name": "dinov2_vits14_lc",
    "args": {"depth": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 7},
}


def ranks(model: dict[str, Any], kept: dict[str, Any], *edits: Any) -> Plan:
    return Plan(model=model, edits=(*plan_of(kept, model).edits, *edits))


KINDS: dict[str, tuple[Plan, int]] = {
    "dense": (Plan(model=MODEL, edits=()), SIZE),
    "ragged": (
        ranks(
            MODEL,
            {
                "blocks.0.attn.input": (0, 3, 5, 23),  # gathered
                "blocks.0.attn.qk": (0, 1, 9),  # the third head has none
                "blocks.0.attn.v": (1, 2, 3, 20),
                "blocks.0.mlp.hidden": (7,),
                "blocks.1.attn.heads": (0, 2),
                "blocks.1.attn.qk": (8,),  # of a head that goes: the others have none
                "blocks.1.mlp.input": (11,),
            },
        ),
        SIZE,
    ),
    "low rank": (
        ranks(
            MODEL,
            {"blocks.0.attn.input": range(12), "blocks.0.mlp.hidden": range(20)},
            LowRank(linear="blocks.0.attn.qkv.q", rank=2),
            LowRank(linear="blocks.0.mlp.fc1", rank=5),
            LowRank(linear="blocks.1.attn.qkv", rank=7),
            LowRank(linear="blocks.1.mlp.fc2", rank=1),
        ),
        SIZE,
    ),
    "dropped": (
        Plan(model=MODEL, edits=(Drop(branch="blocks.0.attn"), Drop(branch="blocks.1.mlp"))),
        SIZE,
    ),
    "swin": (
        ranks(
            SWIN,
            {
                "layers.0.blocks.0.attn.heads": (1,),
                "layers.0.blocks.0.attn.input": (0, 5, 11),
                "layers.0.blocks.1.attn.qk": (0, 1, 2),
                "layers.0.blocks.1.attn.v": (0, 6, 7),
            },
            Drop(branch="layers.0.blocks.0.mlp"),
            LowRank(linear="layers.0.blocks.1.mlp.fc1", rank=3),
        ),
        40,
    ),
    "resnet": (
        ranks(RESNET, {"layer1.0.conv1.channels": (0, 5)}, Drop(branch="layer1.1")),
        SIZE,
    ),
    "mobilenet": (
        Plan(
            model=MOBILENET,
            edits=(Keep(site="blocks.1.0.conv_pw.channels", index=(1,)),),
        ),
        SIZE,
    ),
    "dinov2 lc": (
        ranks(
            DINOV2,
            {"backbone.blocks.1.attn.qk": range(3, 20)},
            Drop(branch="backbone.blocks.0.attn"),
        ),
        42,  # positions are resampled
    ),
}


@cache
def made(kind: str) -> nn.Module:
    plan, _ = KINDS[kind]
    dense = randomise(timm.create_model(plan.model["name"], **plan.model["args"]))
    return cut(dense, plan)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: save(tmp_path / "run", made(kind), KINDS[kind][0])


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace each kind of network once for both formats that begin with ONNX."""
    written: dict[str, bytes] = {}


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_computes_the_same_in_every_format(
    run: Callable[[str], Path], capsys: pytest.CaptureFixture[str], kind: str, to: str
) -> None:
    folder = run(kind)
    main([str(folder), "--to", to, "--image-size", str(KINDS[kind][1])])
    *_, said, last = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{to}: max abs error ")
    assert Path(last) == folder / "export" / to / FILES[to]
