"""Statistics of BatchNorms that were folded for inference are estimated before training."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm2d

from command import Command
from nets import randomise
from vitrim import load
from vitrim.trainer.batchnorm import estimate_batchnorm, folded_batchnorms

NAMES = ["resnet18", "mobilenetv2_035"]


def folded(name: str, **args: Any) -> nn.Module:
    """Return a network whose BatchNorms have biases, but statistics of no image."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5, **args).double()).eval()


def batches() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 32, 32, generator=generator).double(),) for _ in range(3)]


@pytest.mark.parametrize("name", NAMES)
def test_estimating_changes_no_output_and_training_begins_there(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = folded(name)
    estimated = copy.deepcopy(net)
    n_norms = len(folded_batchnorms(net))
    with caplog.at_level(logging.INFO):
        estimate_batchnorm(estimated, batches)
    assert f"estimated the statistics of {n_norms} BatchNorms on 18 images" in caplog.text
    assert not estimated.training
    x = torch.cat([batch for (batch,) in batches()])
    with torch.no_grad():
        wanted = net(x)
        assert torch.allclose(estimated(x), wanted, rtol=1e-9, atol=1e-9)
        trained, destroyed = copy.deepcopy(estimated).train(), net.train()
        assert torch.allclose(trained(x), wanted, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(destroyed(x), wanted, rtol=1e-1)
    norm = next(module for module in estimated.modules() if isinstance(module, BatchNorm2d))
    with torch.no_grad():
        entered = next(net.children())(x)  # the first convolution
    assert torch.allclose(norm.running_mean, entered.mean((0, 2, 3)))  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, entered.var((0, 2, 3), correction=0))  # type: ignore[arg-type]


def test_norms_with_statistics_and_fresh_ones_are_left_alone() -> None:
    def unwanted() -> list[Any]:
        raise AssertionError("no images are needed")

    seen = folded("resnet18").train()
    with torch.no_grad():
        seen(batches()[0][0])
    for net in (seen, timm.create_model("resnet18"), nn.Linear(2, 2)):
        before = copy.deepcopy(net.state_dict())
        assert folded_batchnorms(net) == []
        estimate_batchnorm(net, unwanted)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("trained", ["method.tuning.epochs=1", "method=dcvit"])
def test_training_does_not_destroy_a_folded_checkpoint(
    command: Command, tmp_path: Path, trained: str
) -> None:
    args = {"layers": [1, 2, 2, 1], "channels": [8, 8, 8, 8], "in_chans": 1, "num_classes": 10}
    torch.manual_seed(0)
    dense = randomise(timm.create_model("resnet18", **args))
    path = tmp_path / "folded.safetensors"
    safetensors.torch.save_file(dense.state_dict(), path)
    short = "method.adaptor_training.iterations=1"
    method = ("method=practise", "method.tuning.lr=0", short, trained)
    if trained == "method=dcvit":
        training = ("epochs=1", "lr=0")
        method = (
            trained,
            *(
                f"method.{part}.training.{setting}"
                for part in ("trial", "tuning")
                for setting in training
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
        "method.protected=[0,0]",
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
    assert folded_batchnorms(compact) == []
