"""`vitrim.compress` on a real network and real images is the command, to the digit."""

import json
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import vitrim
from command import Command

DATA = Path(__file__).parents[3] / "shared" / "data"
TAR, WEIGHTS = DATA / "imagenet_mini.tar", DATA / "vit_tiny_patch16_224.safetensors"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (TAR.is_file() and WEIGHTS.is_file()), reason=f"no real weights and images in {DATA}"
    ),
]


def test_a_shuffled_loader_gives_the_commands_result(command: Command, tmp_path: Path) -> None:
    with tarfile.open(TAR) as archive:
        archive.extractall(tmp_path / "data", filter="data")
    root = tmp_path / "data"
    done = command(
        "experiment=oneshot/vit_tiny",
        "target.macs=0.789",
        f"data.root={root}",
        f"model.checkpoint={WEIGHTS}",
        "data.workers=0",
        "latency.repeats=1",
        "tracking=none",
        "progress=false",
    )
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())

    net = timm.create_model("vit_tiny_patch16_224", checkpoint_path=WEIGHTS)
    prepare = create_transform(**resolve_model_data_config(net))
    images, validation = (ImageFolder(root / part, prepare) for part in ("train", "val"))
    numbers = images.class_to_idx  # there are validation images of some classes only
    validation.target_transform = lambda at: numbers[validation.classes[at]]
    loader = DataLoader(images, batch_size=32, shuffle=True, drop_last=True)
    found = vitrim.compress(
        net, loader, "oneshot", macs=0.789, batch_size=50, validation=validation, progress=False
    )
    for key in ("top1", "top5", "macs", "params"):
        assert found.report["compact"][key] == report["compact"][key]
    again, plan = vitrim.load(done.report.parent)
    assert found.plan.edits == plan.edits
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.net.state_dict().items())
