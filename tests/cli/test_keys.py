"""An option that is accepted acts; what a run would ignore or overrule is refused with the way."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra

from command import QUICK, Command
from refusals import TINY, assert_refused
from vitrim.budget import cost
from vitrim.cli import app
from vitrim.errors import ConfigError
from vitrim.jobs import distributed
from vitrim.jobs.distributed import check_processes, check_workers


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.training=inf", "expected keys and values: model.training.KEY=VALUE"),
        ("method.fine_tuning=abc", "expected keys and values: method.fine_tuning.KEY=VALUE"),
        ("model.args=null", "expected keys and values: model.args.KEY=VALUE"),
        ("model.args='[0'", "expected keys and values: model.args.KEY=VALUE"),
        ("model.mean=0", "expected a list"),
        ("method.gate_lr=0x10", "expected a number"),
        ("method.gating.epochs=[1,2]", "expected a number"),
        ("model.checkpoint=true", "expected the name of a file"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(
    command: Command, word: str, expected: str
) -> None:
    key = word.partition("=")[0]
    assert_refused(command, "method=vtp", "strength=1", word, expected=[f"{key}=", expected])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [
                "+trainer.max_epochs=3", "+trainer.gradient_clip_val=1",
                "+trainer.logger=false", "+trainer.enable_checkpointing=false",
                "+trainer.max_steps=5", "+trainer.max_time=1", "+trainer.fast_dev_run=true",
                "+trainer.overfit_batches=2", "+trainer.limit_test_batches=2",
                "+callbacks=[]", "+logger=csv", "+nonsense=1", "+latency.device2=cpu",
                "+checkpoint.steps=5",
            ],
            [
                "unknown key trainer.max_epochs: each phase has its epochs: model.training.epochs",
                "trainer.gradient_clip_val: each phase has its clip_norm",
                "trainer.logger: set tracking",
                "trainer.enable_checkpointing: set checkpoint.minutes",
                "trainer.max_steps: ", "trainer.max_time: set sweep.minutes",
                "trainer.fast_dev_run: ", "trainer.overfit_batches: set data.samples",
                "unknown key trainer.limit_test_batches: expected one of accelerator",
                "unknown key callbacks: set trainer.callbacks", "unknown key logger: set tracking",
                "unknown key nonsense: expected one of strength",
                "unknown key latency.device2: expected one of batch",
                "unknown key checkpoint.steps: expected one of minutes",
            ],
        ),
        (
            [
                "+data.n_classes=5", "+data.chosen=[1]", "+model.width=3",
                "+model.training.batch=3", "+method.gating.steps=3", "+model.args.img_size=8",
            ],
            [
                "unknown key data.n_classes: the images tell",
                "unknown key data.chosen: expected one of batch_size",
                "unknown key model.width: expected one of name, pretrained",
                "unknown key model.training.batch: expected one of epochs",
                "unknown key method.gating.steps: expected one of epochs",
                "unknown key model.args.img_size: set model.image_size",
            ],
        ),
        (
            [
                "data=imagefolder", "data.root=/nowhere", "+data.bad_images.most=3",
                "+data.mixing.alpha=1", "+data.augmentation.crop_pct=0.9",
                "+data.augmentation.mean=[0,0,0]",
            ],
            [
                "unknown key data.bad_images.most: expected one of limit, evaluation",
                "unknown key data.mixing.alpha: expected one of mixup_alpha",
                "unknown key data.augmentation.crop_pct: expected one of ",
                "unknown key data.augmentation.mean: set model.mean",
            ],
        ),
        (["data=none", "+data.n_classes=5"], ["unknown key data.n_classes: the images tell"]),
        (["data=none", "+data.nonsense=5"], ["unknown key data.nonsense: expected one of classes"]),
        (
            ["trainer.limit_val_batches=0", "+trainer.accumulate_grad_batches=0"],
            ["trainer.limit_val_batches=0: ", "trainer.accumulate_grad_batches=0: "],
        ),
        (
            ["trainer.check_val_every_n_epoch=0", "trainer.compile=1"],
            ["trainer.check_val_every_n_epoch=0: ", "trainer.compile=1: "],
        ),
        (
            ["method=vtp", "method.gating.keep=best", "model.training.keep=best"],
            [
                "method.gating: keep=best has nothing to choose from: there is a validation every "
                "10 epochs, and epochs=",
                "model.training: keep=best has nothing",
            ],
        ),
        (
            ["method=vtp", "data=none", "method.gating.keep=best"],
            ["method.gating.keep=best: data=none has no images to choose by: set keep=last"],
        ),
    ],
)  # fmt: skip
def test_what_a_run_would_ignore_is_refused(
    command: Command, words: list[str], expected: list[str]
) -> None:
    assert_refused(command, *TINY, *words, expected=expected)


def test_steps_that_a_scorer_takes_by_itself_are_not_accumulated(command: Command) -> None:
    words = (*QUICK, "method=practise", "+trainer.accumulate_grad_batches=2")
    expected = "trainer.accumulate_grad_batches=2: the scoring of method=practise takes a step"
    assert_refused(command, *words, expected=[expected])


def test_settings_of_images_may_stay_without_images(command: Command) -> None:
    words = ("+data.batch_size=50", "+data.samples=4", "+data.mixing={prob: 1.0}")
    assert command(*QUICK, "data=none", *words).code == 0


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("no process may be started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.devices=200"], ["trainer.devices=200: this machine has"]),
        (["trainer.devices=0"], ["trainer.devices=0: expected a number from 1 on"]),
        (["trainer.accelerator=gpu", "trainer.devices=300"], ["trainer.devices=300"]),
        (["+trainer.num_nodes=50"], ["trainer.num_nodes=50: this command starts processes on"]),
        (["data=imagefolder", "data.root=x", "data.workers=9999"], ["data.workers=9999: expected"]),
    ],
)
def test_more_processes_than_the_machine_has_room_for_are_refused(
    command: Command, words: list[str], expected: list[str]
) -> None:
    assert_refused(command, *TINY, "trainer.strategy=ddp", *words, expected=expected)


@pytest.mark.usefixtures("no_process")
def test_the_bound_also_holds_where_processes_are_started() -> None:
    trainer = {"devices": 200, "accelerator": "cpu"}
    with (
        pytest.raises(ConfigError, match=r"set trainer\.devices="),
        distributed.process_group(trainer),
    ):
        pass
    check_processes({"devices": 2, "accelerator": "cpu"})
    check_workers(8)


def test_a_run_is_composed_once_and_its_dense_network_counted_once(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counting(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    counting(Hydra, "compose_config")
    counting(cost, "count_layers")
    cost.shared_cost.cache_clear()
    assert command(*QUICK, "data=none").code == 0
    assert calls == {"compose_config": 1, "count_layers": 1}


SWEEPING = """# @package _global_
defaults:
  - override /data: none
  - override /method: fskd
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      strength: 0,1
"""


def test_a_yaml_may_be_a_sweep_whose_jobs_are_single_runs(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "sweeping.yaml").write_text(SWEEPING)
    jobs: list[list[str]] = []

    def run_job(arguments: list[str], **options: object) -> str:
        jobs.append(arguments)
        return ""

    monkeypatch.setattr(app.sweep, "run_job", run_job)
    words = ("--config-dir", str(tmp_path / "conf"), "experiment=sweeping", "latency.repeats=1")
    assert command(*words).code == 0
    assert len(jobs) == 2
    alone = command(*jobs.pop())
    assert alone.code == 0, alone.message
    assert len(jobs) == 1  # it started none of its own, whatever its yaml says
    words = ("-m", "latency.repeats=1", "data=none")
    for asked in (words, ("hydra.mode=MULTIRUN", *words[1:])):
        jobs.clear()
        assert command(*asked, "strength=0,1").code == 0
        assert len(jobs) == 2
    done = command(*jobs[1])
    assert done.code == 0, done.message
    assert len(jobs) == 2  # it started none of its own
    assert "/s1-seed0-" in str(done.report)
    monkeypatch.setenv("VITRIM_STATUS", str(tmp_path / "status.json"))
    assert "cannot be a sweep" in command(*words, "strength=0,1").message
