"""How many processes load batches."""

from __future__ import annotations

import os

import pytest

from vitrim.data.loading import Loading, cores


def test_auto_takes_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr("vitrim.data.loading.Path.read_text", lambda _: "max 100000")
    assert cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores() == 2
    monkeypatch.setattr("vitrim.data.loading.Path.read_text", lambda _: "400000 100000")
    assert cores() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert cores() == 12
    assert Loading(workers="auto").n_workers == 12


def test_no_more_workers_than_batches() -> None:
    assert Loading(workers=8).options(batches=3)["num_workers"] == 3
    assert Loading(workers=8, prefetch_factor=4).options(batches=9)["prefetch_factor"] == 4
    assert Loading(workers=0).options(batches=9) == {
        "num_workers": 0, "persistent_workers": False, "pin_memory": False,
    }  # fmt: skip
