"""Runs of two processes: started by the command or by torchrun, counted once, refused in sweeps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrim
from command import QUICK, Command
from vitrim.data import ImageSpec
from vitrim.data.digits import Digits
from vitrim.errors import ConfigError
from vitrim.jobs.distributed import requested_processes

TWO = ("trainer.devices=2", "trainer.strategy=ddp", "strength=3")


def ran(*command: str) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.endswith("report.json")]
    return Path(line)


def accuracy_of(folder: Path) -> float:
    """Return the top-1 of a saved network over every held-out digit, without a trainer."""
    recipe: Any = vitrim.load(folder)
    net, _ = recipe
    digits = Digits(batch_size=360, held_out=0.2, shift=0.0, rotation=0.0, label_smoothing=0.0)
    spec = ImageSpec(
        channels=1, size=(8, 8), mean=(0.5,), std=(0.5,), interpolation="bicubic", crop_pct=1.0
    )
    (batch,) = digits.module(spec).val_dataloader()
    with torch.no_grad():
        return 100 * float((net(batch[0]).argmax(1) == batch[1]).double().mean())


def test_two_processes_of_one_command_count_every_image_once(tmp_path: Path) -> None:
    report = ran(
        "-m", "vitrim", *QUICK, *TWO, "method.gating.epochs=1",
        "method.fine_tuning.epochs=1", f"out={tmp_path}",
    )  # fmt: skip
    content = json.loads(report.read_text())
    assert content["compact"]["top1"] == pytest.approx(accuracy_of(report.parent), abs=1e-4)
    assert json.loads((report.parent / "status.json").read_text())["status"] == "DONE"


def test_under_torchrun_statistics_are_those_of_one_process(
    tmp_path: Path, command: Command
) -> None:
    start = command(*QUICK, "strength=0").report.parent
    words = (*QUICK, f"model.checkpoint={start}", "method=oneshot", "target.macs=0.7")
    alone = command(*words).report.parent
    together = ran(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "vitrim", *words, "trainer.devices=2", "trainer.strategy=ddp",
        f"out={tmp_path / 'two'}",
    ).parent  # fmt: skip
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (alone, together)]
    assert plans[0]["edits"] == plans[1]["edits"]
    one, two = ((folder / "model.safetensors").read_bytes() for folder in (alone, together))
    assert one == two


def test_sweeps_of_jobs_of_several_processes_are_refused(command: Command) -> None:
    done = command("-m", *QUICK, *TWO)
    assert done.code == 1
    for way in ("without -m", "torchrun", "hydra/launcher=slurm"):
        assert way in done.message


@pytest.mark.parametrize(
    ("trainer", "processes"),
    [
        ({}, 1),
        ({"devices": 3}, 3),
        ({"devices": [0, 2]}, 2),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({"devices": "2"}, 2),
    ],
)
def test_how_many_processes_a_trainer_asks_for(trainer: dict[str, Any], processes: int) -> None:
    assert requested_processes(trainer) == processes


def test_devices_that_are_no_number_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.devices=many"):
        requested_processes({"devices": "many"})


@pytest.mark.gpu
def test_a_network_that_is_shared_out_among_gpus_is_saved_whole(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    report = ran("-m", "vitrim", *QUICK, "trainer=fsdp", "strength=3", f"out={tmp_path}")
    content = json.loads(report.read_text())
    assert content["compact"]["top1"] == pytest.approx(accuracy_of(report.parent), abs=1e-4)
