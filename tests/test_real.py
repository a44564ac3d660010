"""Real weights and images, where they are at hand: numbers that random networks cannot give."""

import json
import tarfile
from pathlib import Path

import pytest

from command import Command

DATA = Path(__file__).parents[2] / "shared" / "data"
TAR, WEIGHTS = DATA / "imagenet_mini.tar", DATA / "vit_tiny_patch16_224.safetensors"
pytestmark = pytest.mark.skipif(
    not (TAR.is_file() and WEIGHTS.is_file()), reason=f"no real weights and images in {DATA}"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(TAR) as archive:
        archive.extractall(folder, filter="data")
    return folder


def stages(command: Command, pictures: Path, *arguments: str) -> dict[str, float]:
    done = command(
        "experiment=oneshot/vit_tiny",
        f"data.root={pictures}",
        f"model.checkpoint={WEIGHTS}",
        "data.workers=0",
        "trainer.log_every_n_steps=1",
        "latency.repeats=1",
        "tracking=none",
        "progress=false",
        *arguments,
    )
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    return {
        "dense": report["dense"]["top1"],
        **{name: found["top1"] for name, found in report["stages"].items()},
    }


def test_few_images_keep_most_of_the_accuracy(command: Command, pictures: Path) -> None:
    few = ("method.sampling.images=50", "trainer.limit_val_batches=2")  # judged on 100
    found = stages(command, pictures, "strength=1", *few)
    assert found["refit"] > found["dense"] - 8


@pytest.mark.slow
@pytest.mark.parametrize(("strength", "top1"), [(1, 80.0), (3, 74.0), (5, 57.0)])
def test_without_training(command: Command, pictures: Path, strength: int, top1: float) -> None:
    assert stages(command, pictures, f"strength={strength}")["refit"] >= top1
