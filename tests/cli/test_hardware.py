"""What would end a run after its training is refused before it, in one sentence."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from command import Command
from identities import composed
from nets import small_net
from phase_runner import DIGITS, runner
from refusals import TINY, assert_refused
from vitrim.cli.compose import build_job
from vitrim.cli.hardware import check_device, check_trainer, threads
from vitrim.errors import ConfigError, shown
from vitrim.jobs.distributed import requested_processes
from vitrim.measure import latencies
from vitrim.trainer.calibrate import Calibrate, Sampling

CPU = {"accelerator": "cpu", "devices": 1, "strategy": "auto"}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_what_would_fail_after_training_is_refused_before(command: Command) -> None:
    words = [
        "trainer.limit_val_batches=0.1",
        "trainer.limit_train_batches=0.01",
        "trainer.accelerator=warp",
    ]
    expected = [
        "trainer.limit_val_batches=0.1 of 6 validation batches is none",
        "trainer.limit_train_batches=0.01 of 22 training batches is none",
        "trainer.accelerator=warp",
    ]
    assert_refused(command, *TINY, *words, expected=expected)


def test_options_that_cannot_work_are_refused_together(command: Command) -> None:
    words = [
        "latency.batch=1000000000000",
        "latency.device=cuda:99",
        "seed=4294967296",
        "trainer.precision=bf16-true",
        "+trainer.gpus=1",
        "trainer.strategy=ddp_spawn",
    ]
    expected = [
        "latency.batch=1000000000000: expected a whole number from 1 on, up to 65,536",
        "latency.device=cuda:99: expected a device of this machine, such as cpu",
        "seed=4294967296: expected a whole number from 0 to 4294967295",
        "trainer.precision=bf16-true: expected one of 32-true, bf16-mixed",
        "unknown key trainer.gpus",
        "trainer.strategy=ddp_spawn: expected one of auto, ddp, fsdp",
    ]
    assert_refused(command, *TINY, *words, expected=expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["trainer=gpu"], ["trainer.accelerator=gpu", "trainer=cpu"], marks=no_gpu),
        (["trainer.devices=400", "trainer.strategy=ddp"], ["trainer.devices=400: this machine"]),
    ],
)
def test_a_trainer_that_this_machine_does_not_have(
    command: Command, arguments: list[str], expected: list[str]
) -> None:
    assert_refused(command, *TINY, *arguments, expected=expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("precision", True),
        ("precision", "fp16"),
        ("precision", ["32"]),
        ("precision", None),
        ("strategy", "ddp_notebook"),
        ("strategy", ""),
    ],
)
def test_an_option_of_the_trainer_that_cannot_work(option: str, value: Any) -> None:
    (problem,) = check_trainer({**CPU, option: value})
    assert problem.startswith(f"trainer.{option}={shown(value)}: ")


@pytest.mark.parametrize("devices", [0, -3, 1.5, [], True, None, "x", "0"])
def test_devices_that_are_no_processes(devices: Any) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices=") as error:
        requested_processes({**CPU, "devices": devices})
    assert str(error.value).startswith(f"trainer.devices={shown(devices)}: ")


@pytest.mark.parametrize("trainer", [CPU, {**CPU, "precision": "bf16-mixed", "devices": "2"}])
def test_options_of_the_trainer_that_work(trainer: dict[str, Any]) -> None:
    assert check_trainer(trainer) == []


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", None, 3, "", []])
def test_the_device_that_measures_must_compute(device: Any) -> None:
    assert check_device("cpu") == []
    (problem,) = check_device(device)
    assert problem.startswith(f"latency.device={shown(device)}: expected a device of this machine")


def test_latency_is_measured_in_the_precision_of_the_weights() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)).bfloat16()
    (time,) = latencies([net], 8, batch=1, repeats=1, device="cpu", blocks=False)
    assert time.median > 0


def test_a_share_of_one_batch_of_calibration_is_that_batch(tmp_path: Path) -> None:
    few = partial(runner(tmp_path).trainer, limit_train_batches=0.5)
    phases = replace(runner(tmp_path), trainer=few)
    net = small_net(dtype=torch.float32, **DIGITS)
    sampling = Sampling(images=64, tokens=2, class_token_weight=1.0)
    scorer = Calibrate(net, sites=("blocks.0.mlp.hidden",), sampling=sampling, taylor=False)
    phases.run_or_load(tmp_path / "score", scorer, name="score")


@pytest.mark.parametrize(
    ("words", "number", "expected"),
    [
        ((), None, 1),
        ((), 3, 3),
        (("model=vit_tiny",), None, 2),  # 1.1 G MACs an image
        (("model=vit_tiny",), 1, 1),
    ],
)
def test_threads_are_chosen_by_the_work(
    words: tuple[str, ...], number: int | None, expected: int
) -> None:
    job = build_job(composed(*words, "data=none"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads(number, job, 64) as chosen:
            assert chosen == torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", ["0", "x", "1.5", "100000"])
def test_a_number_of_threads_that_cannot_be_is_refused(command: Command, value: str) -> None:
    assert_refused(command, *TINY, f"threads={value}", expected=[f"threads={value}", "null or"])
