"""Local sweeps: how many jobs at a time, and on which GPUs."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from command import Command
from vitrim.cli.launcher import places
from vitrim.errors import ConfigError
from vitrim.jobs import sweep

GPU = {"accelerator": "gpu", "devices": 1}


def config(trainer: Mapping[str, Any], jobs: Any = None) -> Any:
    return OmegaConf.create({"trainer": dict(trainer), "sweep": {"jobs": jobs}})


@pytest.mark.parametrize(
    ("trainer", "number", "visible", "expected"),
    [
        ({"accelerator": "cpu", "devices": 1}, None, None, [None]),
        ({"accelerator": "cpu", "devices": 1}, 2, None, [None, None]),
        (GPU, None, None, ["0", "1", "2"]),
        (GPU, None, "5,GPU-7,9", ["5", "GPU-7", "9"]),
        (GPU, 2, None, ["0", "1"]),
        (GPU, 5, None, ["0", "1", "2", "0"]),
        ({**GPU, "devices": [1]}, None, None, [None]),
    ],
)
def test_every_job_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    trainer: Mapping[str, Any],
    number: int | None,
    visible: str | None,
    expected: list[str | None],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = places(config(trainer, number), 4)
    assert [place.environment.get("CUDA_VISIBLE_DEVICES") for place in found] == expected


@pytest.mark.parametrize("number", [0, 1.5, "many"])
def test_a_number_of_jobs_that_is_none(number: Any) -> None:
    with pytest.raises(ConfigError, match=f"sweep.jobs={number}: expected"):
        places(config(GPU, number), 4)


def test_jobs_of_a_sweep_overlap_and_each_keeps_its_result(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=60)

    def done(arguments: list[str], place: sweep.Place, **options: Any) -> str:
        both.wait()
        if "strength=2" in arguments:
            raise sweep.JobError("strength=2: failed")
        return json.dumps([*place.words])

    monkeypatch.setattr(sweep, "run_job", done)
    finished = command("-m", "strength=1,2", "sweep.jobs=2")
    assert finished.code == 1
    assert finished.message.splitlines()[-1] == "vitrim: strength=2: failed"


def test_one_job_at_a_time_shows_its_progress(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[sweep.Place] = []
    monkeypatch.setattr(sweep, "run_job", lambda words, place, **options: seen.append(place))
    assert command("-m", "strength=1,2").code == 0
    assert seen == [sweep.ALONE, sweep.ALONE]
