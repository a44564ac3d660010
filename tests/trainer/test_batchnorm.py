"""Norms that never counted, as in checkpoints folded for inference, count before training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm2d

from command import Command
from conftest import randomise
from vitrim import load
from vitrim.trainer.batchnorm import count, uncounted

NAMES = ["resnet18", "mobilenetv2_035"]


def folded(name: str, **args: Any) -> nn.Module:
    """Return a network whose norms have biases, but statistics of no image."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5, **args).double()).eval()


def batches() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 32, 32, generator=generator).double(),) for _ in range(3)]


@pytest.mark.parametrize("name", NAMES)
def test_counting_changes_no_output_and_training_begins_there(name: str) -> None:
    net = folded(name)
    counted = copy.deepcopy(net)
    count(counted, batches)
    assert not counted.training
    x = torch.cat([batch for (batch,) in batches()])
    with torch.no_grad():
        wanted = net(x)
        assert torch.allclose(counted(x), wanted, rtol=1e-9, atol=1e-9)
        trained, undone = copy.deepcopy(counted).train(), net.train()
        assert torch.allclose(trained(x), wanted, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(undone(x), wanted, rtol=1e-1)
    norm = next(module for module in counted.modules() if isinstance(module, BatchNorm2d))
    with torch.no_grad():
        entered = next(net.children())(x)  # the first convolution
    assert torch.allclose(norm.running_mean, entered.mean((0, 2, 3)))  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, entered.var((0, 2, 3), correction=0))  # type: ignore[arg-type]


def test_norms_that_count_and_fresh_ones_are_left_alone() -> None:
    def unwanted() -> list[Any]:
        raise AssertionError("no images are needed")

    seen = folded("resnet18").train()
    with torch.no_grad():
        seen(batches()[0][0])
    for net in (seen, timm.create_model("resnet18"), nn.Linear(2, 2)):
        before = copy.deepcopy(net.state_dict())
        assert uncounted(net) == []
        count(net, unwanted)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("trained", ["method.tuning.epochs=1", "method=dcvit"])
def test_training_does_not_undo_a_folded_checkpoint(
    command: Command, tmp_path: Path, trained: str
) -> None:
    args = {"layers": [1, 2, 2, 1], "channels": [8, 8, 8, 8], "in_chans": 1, "num_classes": 10}
    torch.manual_seed(0)
    dense = randomise(timm.create_model("resnet18", **args))
    path = tmp_path / "folded.safetensors"
    safetensors.torch.save_file(dense.state_dict(), path)
    method = ("method=practise", "method.tuning.lr=0", trained)
    if trained == "method=dcvit":
        training = ("epochs=1", "lr=0")
        method = (
            trained,
            *(
                f"method.{part}.training.{said}"
                for part in ("trial", "tuning")
                for said in training
            ),
        )
    done = command(
        "model=resnet34",
        "model.name=resnet18",
        f"model.checkpoint={path}",
        "model.num_classes=10",
        "model.image_size=8",
        *(f"+model.args.{key}={args[key]}".replace(" ", "") for key in ("layers", "channels")),
        "+model.args.in_chans=1",
        "model.mean=[0.5]",
        "model.std=[0.5]",
        *method,
        "method.spare=[0,0]",
        "target.blocks=1",
        "latency.repeats=1",
        "tracking=none",
        "progress=false",
    )
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    assert report["stages"]["mimic"]["top5"] == pytest.approx(
        report["stages"]["cut"]["top5"], abs=9
    )
    compact, _ = load(done.report.parent)
    assert uncounted(compact) == []
