"""`model.image_size` is the one key for the size of images, square or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrim
from command import QUICK, Command
from identities import write_images
from vitrim.budget.cost import Cost
from vitrim.errors import ConfigError
from vitrim.model.source import Timm
from vitrim.trainer.recipe import Recipe

SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 3}
SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3]}
NETWORKS: list[tuple[str, list[int], dict[str, Any]]] = [
    ("vit_tiny_patch16_224", [32, 48], SMALL),
    ("deit_tiny_distilled_patch16_224", [48, 32], SMALL),
    ("vit_small_patch14_dinov2", [28, 42], {**SMALL, "dynamic_img_size": True}),
    (
        "swin_tiny_patch4_window7_224",
        [56, 112],
        {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3]},
    ),
    (
        "swinv2_tiny_window8_256",
        [64, 128],
        {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3]},
    ),
    ("beit_base_patch16_224", [32, 48], SMALL),
    ("eva02_tiny_patch14_224", [28, 42], {"depth": 1}),
    ("mobilenetv2_100", [32, 64], {}),
]


def source(name: str, size: Any, **args: Any) -> Timm:
    recipe = Recipe(epochs=1, lr=0.0, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)
    return Timm(
        name=name, pretrained=False, checkpoint=None, sha256=None, num_classes=5, reset_head=False,
        image_size=size, mean=None, std=None, args=args, training=recipe,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "size", "args"), NETWORKS)
def test_images_need_not_be_square(name: str, size: list[int], args: dict[str, Any]) -> None:
    model = source(name, size, **args)
    spec = model.spec()
    assert spec.size == tuple(size)
    turned = source(name, size[::-1], **args)
    macs = [Cost(m.skeleton(), m.spec().size).dense_count.macs for m in (model, turned)]
    assert macs[0] == macs[1]
    with torch.no_grad():
        assert model.build()(torch.randn(1, 3, *size)).shape == (1, 5)


def test_two_equal_sides_are_one() -> None:
    one, two = source("vit_tiny_patch16_224", 32), source("vit_tiny_patch16_224", [32, 32])
    assert one.description() == two.description()
    assert one.spec() == two.spec()


@pytest.mark.parametrize("size", [[32], [32, 32, 32], "32", [0, 32], True, 32.5, [32, 40]])
def test_other_sizes_are_refused(size: object) -> None:
    with pytest.raises(ConfigError, match=r"model\.image_size="):
        source("vit_tiny_patch16_224", size)


def test_the_other_spelling_is_refused_with_the_way() -> None:
    with pytest.raises(ConfigError, match=r"img_size=128: set model\.image_size=128"):
        source("vit_tiny_patch16_224", None, img_size=128)


def test_a_run_on_images_that_are_not_square(command: Command, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    words = (
        *QUICK, "data=imagefolder", f"data.root={root}", "data.batch_size=4", "data.workers=0",
        "model.num_classes=2", "model.args.in_chans=3", "model.args.depth=1", "method=fskd",
        "model.image_size=[8,12]", "target.macs=0.7",
    )  # fmt: skip
    done = command(*words)
    assert done.code == 0, done.message
    net, plan = vitrim.load(done.report.parent)
    assert plan.model["args"]["img_size"] == [8, 12]
    assert net(torch.rand(1, 3, 8, 12)).shape == (1, 2)
    assert json.loads(done.report.read_text())["kept"]["macs"] <= 0.7
